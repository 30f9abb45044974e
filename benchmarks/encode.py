"""How many prompts are encoded a second: one client after the other, and sixteen at once, whom the encoder batches."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import httpx2

from benchmarks.processes import serve
from benchmarks.results import Figure, Findings
from benchmarks.setting import Setting
from zimage.checkpoints import make_checkpoint

NAME = "encode"
CLIENTS = 16
PROMPTS, ROUNDS, QUICK_PROMPTS = 200, 5, 40  # prompts a way, over all rounds
AIM = 2.5
_SUBJECTS = ("a cat", "a red circle", "an old lighthouse", "two dogs", "a bowl of fruit", "the sea at night")
_STYLES = ("in oil", "in the rain", "on blue paper", "at dawn", "as a woodcut")


def run(setting: Setting) -> Findings:
    """Measures the benchmark's encoder, and the tiny one, where the way through HTTP is nearly all there is."""
    bench = asyncio.run(_rounds(setting.server.url, quick=setting.quick))
    model = make_checkpoint(setting.data_dir / "checkpoints" / "tiny")
    with serve(model, setting.data_dir) as server:
        tiny = asyncio.run(_rounds(server.url, quick=setting.quick))
    return Findings([*_figures("bench", bench, AIM), *_figures("tiny", tiny, None)], {"bench": bench, "tiny": tiny})


def _figures(name: str, rounds: list[dict[str, float]], aim: float | None) -> list[Figure]:
    gain = statistics.median(one["together_per_s"] / one["alone_per_s"] for one in rounds)
    what = f"{name}: {CLIENTS} clients / one client"
    return [
        Figure(benchmark=NAME, what=what, value=gain, aim=aim, better="more"),
        *(
            Figure(
                benchmark=NAME, what=f"{name}: {label}", value=statistics.median(one[key] for one in rounds), unit="/s"
            )
            for label, key in (("one client", "alone_per_s"), (f"{CLIENTS} clients", "together_per_s"))
        ),
    ]


def prompts() -> Iterator[str]:
    """Short prompts, all different, of 10 to 20 tokens."""
    for number in itertools.count():
        subject, style = _SUBJECTS[number % len(_SUBJECTS)], _STYLES[number % len(_STYLES)]
        yield f"Picture {number} of {subject} {style}"


async def _rounds(url: str, *, quick: bool) -> list[dict[str, float]]:
    count = (QUICK_PROMPTS if quick else PROMPTS) // ROUNDS
    source = prompts()
    limits = httpx2.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=None, limits=limits) as client:
        await _phase(client, CLIENTS, list(itertools.islice(source, 2 * CLIENTS)))  # opens the connections
        rounds = []
        for number in range(ROUNDS):
            ways: list[tuple[str, int]] = [("alone_per_s", 1), ("together_per_s", CLIENTS)]
            taken = {}
            for key, clients in ways if number % 2 else reversed(ways):
                taken[key] = await _phase(client, clients, list(itertools.islice(source, count)))
            rounds.append(taken)
    return rounds


async def _phase(client: httpx2.AsyncClient, clients: int, texts: list[str]) -> float:
    """Prompts a second."""
    left = iter(texts)

    async def work() -> None:
        for text in left:
            answer: Any = await client.post("/api/encode", json={"prompt": text})
            answer.raise_for_status()

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(work())
    return len(texts) / (time.perf_counter() - started)
