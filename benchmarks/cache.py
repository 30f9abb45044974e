"""What a prompt costs that was encoded before, against one that was not."""

import re
import statistics
import uuid

import httpx2

from benchmarks.processes import Server, serve
from benchmarks.results import Figure, Findings
from benchmarks.setting import Setting

NAME = "cache"
PROMPTS, QUICK_PROMPTS = 40, 8
TAIL = " in the sun, beside a large blue square" * 8  # some eighty tokens: what people write
AIM = 0.1


def run(setting: Setting) -> Findings:
    """Encodes prompts, then the same again; the encoder's own counter tells how many it saw."""
    count = QUICK_PROMPTS if setting.quick else PROMPTS
    with serve(setting.model, setting.data_dir, ZIMAGE_ENCODING_CACHE_BYTES=str(256 << 20)) as server:
        prompts = [f"{uuid.uuid4().hex} {number}{TAIL}" for number in range(count)]
        with httpx2.Client(base_url=server.url, trust_env=False, timeout=None) as client:
            for number in range(3):
                _seconds(client, f"{uuid.uuid4().hex} {number}{TAIL}")  # warms up
            new = [_seconds(client, prompt) for prompt in prompts]
            before = _encodes(client, server)
            again = [_seconds(client, prompt) for prompt in prompts]
            asked = _encodes(client, server) - before
    ratio = statistics.median(again) / statistics.median(new)
    figures = [
        Figure(benchmark=NAME, what="encodes for prompts that come again", value=asked, aim=0),
        Figure(benchmark=NAME, what="embeddings of a prompt, again / new", value=ratio, aim=AIM),
        Figure(benchmark=NAME, what="new", value=1000 * statistics.median(new), unit="ms"),
        Figure(benchmark=NAME, what="again", value=1000 * statistics.median(again), unit="ms"),
    ]
    return Findings(figures, {"new_s": new, "again_s": again})


def _seconds(client: httpx2.Client, prompt: str) -> float:
    """How long the gateway needed for the embeddings."""
    answer = client.post("/api/encode", json={"prompt": prompt})
    answer.raise_for_status()
    return float(answer.json()["encode_time"])


def _encodes(client: httpx2.Client, server: Server) -> int:
    """How many requests for hidden states the encoder has answered."""
    url = client.get("/health").json()["services"]["encoder"]["url"]
    text = httpx2.get(f"{url.rstrip('/')}/metrics", trust_env=False).text
    found = re.search(r'zimage_requests_total\{.*route="/v1/hidden_states".*\} ([0-9.]+)', text)
    if found is None:
        raise LookupError(f"{server.url}: its encoder counts no encodes")
    return int(float(found[1]))
