"""What a picture costs over HTTP, through three processes, compared with a script that uses diffusers directly."""

import re
import statistics
import time
from typing import Any

import httpx2

from benchmarks.neighbours import Neighbours
from benchmarks.processes import Baseline, Server, baseline
from benchmarks.results import Figure, Findings, median_ratio
from benchmarks.setting import Setting

NAME = "overhead"
SIZE_PX, STEPS = 512, 9
PAIRS, QUICK_PAIRS = 7, 2
AIM = 1.05
_STAGES = ("encode", "queue", "denoise", "decode", "png")


def run(setting: Setting) -> Findings:
    """Alternates the two ways, each first as often as second, after a picture that warms both up."""
    with baseline(setting.model, setting.data_dir / "bench-baseline.log") as script:
        count = QUICK_PAIRS if setting.quick else PAIRS
        taken = pairs(setting.server, script, count, size_px=SIZE_PX, steps=STEPS)
    return findings(NAME, taken, aim=AIM, threads=script.facts["threads"])


def pairs(server: Server, script: Baseline, count: int, *, size_px: int, steps: int) -> list[dict[str, Any]]:
    """So many pairs of a picture over HTTP and one by the script."""
    taken = []
    for number in range(count + 1):
        prompt = f"Picture {number} of a cat"
        body = {"prompt": prompt, "width": size_px, "height": size_px, "steps": steps, "seed": number}
        neighbours = Neighbours()
        if number % 2:
            pair = _over_http(server, body) | _by_script(script, body)
        else:
            pair = _by_script(script, body) | _over_http(server, body)
        taken.append(pair | {"others_cores": neighbours.cores()})
    return taken[1:]


def findings(name: str, taken: list[dict[str, Any]], *, aim: float, threads: int) -> Findings:
    """The figures of such pairs."""
    ours, theirs = [one["server_s"] for one in taken], [one["script_s"] for one in taken]
    rest_ours = [one["server_s"] - one["stages_s"]["encode"] for one in taken]
    rest_theirs = [one["script_s"] - one["script_encode_s"] for one in taken]
    outside = [one["server_s"] - sum(one["stages_s"].values()) for one in taken]
    figures = [
        Figure(benchmark=name, what="server / script, prompt to PNG", value=median_ratio(ours, theirs), aim=aim),
        Figure(benchmark=name, what="the same without text encoding", value=median_ratio(rest_ours, rest_theirs)),
        Figure(benchmark=name, what="server", value=statistics.median(ours), unit="s"),
        Figure(benchmark=name, what="script", value=statistics.median(theirs), unit="s"),
        Figure(benchmark=name, what="HTTP and gateway", value=1000 * statistics.median(outside), unit="ms"),
    ]
    return Findings(figures, {"pairs": taken, "threads": threads})


def _by_script(script: Baseline, body: dict[str, Any]) -> dict[str, Any]:
    drawn = script.draw(body)
    return {"script_s": drawn["seconds"], "script_encode_s": drawn["encode_s"], "script_png_s": drawn["png_s"]}


def _over_http(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    with httpx2.Client(base_url=server.url, trust_env=False, timeout=None) as client:
        client.get("/health/live")  # opens the connection, as a client that stays has it
        started = time.perf_counter()
        answer = client.post("/api/generate", json=body)
        seconds = time.perf_counter() - started
    answer.raise_for_status()
    stages = dict(re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"]))
    return {"server_s": seconds, "stages_s": {name: float(stages[name]) / 1000 for name in _STAGES}}
