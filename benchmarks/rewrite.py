"""How fast texts are written: eight clients at once against one `generate` after another, and what encodes wait."""

import asyncio
import itertools
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import httpx2

from benchmarks.processes import Baseline, Server, baseline
from benchmarks.results import Figure, Findings, percentile
from benchmarks.setting import Setting

NAME = "rewrite"
CLIENTS = 8
TOKENS, QUICK_TOKENS = 64, 16
ROUNDS, QUICK_ROUNDS = 5, 1
GENERATION_TOKENS = 512
ENCODES, QUICK_ENCODES = 40, 15
PAUSE_S = 0.02
GAIN_AIM, WAIT_AIM = 2.0, 2.0
_SUBJECTS = ("a cat", "a red circle", "an old lighthouse", "two dogs", "fruit in a bowl", "the sea", "a street", "snow")


def run(setting: Setting) -> Findings:
    """Asks the encoder, with whose weights prompts are rewritten by default."""
    url = _encoder_url(setting.server)
    with baseline(setting.model, setting.data_dir / "bench-generate.log", module="benchmarks.texts") as script:
        tokens, rounds = (QUICK_TOKENS, QUICK_ROUNDS) if setting.quick else (TOKENS, ROUNDS)
        script.draw(_wanted("warms up", tokens))
        asyncio.run(_together(url, tokens))
        taken = [_pair(url, script, tokens, first=bool(number % 2)) for number in range(rounds)]
        waits = asyncio.run(_waits(url, rounds, QUICK_ENCODES if setting.quick else ENCODES))
    return Findings(_figures(taken, waits), {"pairs": taken, "waits": [asdict(one) for one in waits]})


@dataclass(frozen=True, slots=True)
class Waits:
    """One round: seconds of encodes alone, of encodes beside a text, and of one of its tokens."""

    alone_s: list[float]
    beside_s: list[float]
    token_s: float

    @property
    def p95(self) -> float:
        """How much longer than alone all but one of twenty encodes take at most, in tokens' time."""
        return (percentile(self.beside_s, 0.95) - statistics.median(self.alone_s)) / self.token_s


def _encoder_url(server: Server) -> str:
    with httpx2.Client(base_url=server.url, trust_env=False, timeout=30) as client:
        url: str = client.get("/health").json()["services"]["encoder"]["url"]
    return url


def _wanted(subject: str, tokens: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"Describe {subject}"}], "max_tokens": tokens, "temperature": 0}


def _figures(taken: list[dict[str, float]], waits: list[Waits]) -> list[Figure]:
    return [
        Figure(
            benchmark=NAME,
            what=f"{CLIENTS} clients / {CLIENTS} generate calls in turn, tokens a second",
            value=statistics.median(one["together_per_s"] / one["in_turn_per_s"] for one in taken),
            aim=GAIN_AIM,
            better="more",
        ),
        Figure(
            benchmark=NAME,
            what=f"{CLIENTS} clients",
            value=statistics.median(one["together_per_s"] for one in taken),
            unit="tokens/s",
        ),
        Figure(
            benchmark=NAME,
            what=f"wait of an encode beside a text of {GENERATION_TOKENS} tokens, p95",
            value=statistics.median(one.p95 for one in waits),
            unit="tokens' time",
            aim=WAIT_AIM,
        ),
        Figure(
            benchmark=NAME,
            what="a token's time",
            value=1000 * statistics.median(one.token_s for one in waits),
            unit="ms",
        ),
        Figure(
            benchmark=NAME,
            what="an encode alone",
            value=1000 * statistics.median(second for one in waits for second in one.alone_s),
            unit="ms",
        ),
    ]


def _pair(url: str, script: Baseline, tokens: int, *, first: bool) -> dict[str, float]:
    """Both ways, each first as often as second."""
    if first:
        in_turn = _in_turn(script, tokens)
        return {"in_turn_per_s": in_turn, "together_per_s": asyncio.run(_together(url, tokens))}
    together = asyncio.run(_together(url, tokens))
    return {"in_turn_per_s": _in_turn(script, tokens), "together_per_s": together}


def _in_turn(script: Baseline, tokens: int) -> float:
    """Tokens a second of the script."""
    written = [script.draw(_wanted(subject, tokens)) for subject in _SUBJECTS]
    return float(sum(one["tokens"] for one in written) / sum(one["seconds"] for one in written))


async def _together(url: str, tokens: int) -> float:
    """Tokens a second of eight clients that ask at once."""
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=None) as client:
        await asyncio.gather(*(client.get("/health/live") for _ in range(CLIENTS)))  # opens the connections
        started = time.perf_counter()
        answers = await asyncio.gather(*(_complete(client, _wanted(subject, tokens)) for subject in _SUBJECTS))
        return sum(answers) / (time.perf_counter() - started)


async def _complete(client: httpx2.AsyncClient, body: dict[str, Any]) -> int:
    answer = await client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    tokens: int = answer.json()["usage"]["completion_tokens"]
    return tokens


async def _waits(url: str, rounds: int, count: int) -> list[Waits]:
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=None) as client:
        await _encodes(client, 10)
        return [await _round(client, count) for _ in range(rounds)]


async def _round(client: httpx2.AsyncClient, count: int) -> Waits:
    """All three side by side in time, so that what slows one slows the others."""
    alone_s = await _encodes(client, count)
    started = time.perf_counter()
    tokens = await _complete(client, _wanted("everything", GENERATION_TOKENS // 8))
    token_s = (time.perf_counter() - started) / tokens
    writing = asyncio.create_task(_keep_writing(client))
    await asyncio.sleep(10 * token_s)
    beside_s = await _encodes(client, count)
    if writing.done():
        writing.result()  # a text that failed kept nobody waiting
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    return Waits(alone_s, beside_s, token_s)


async def _encodes(client: httpx2.AsyncClient, count: int) -> list[float]:
    seconds = []
    for number in range(count):
        started = time.perf_counter()
        headers = {"accept": "application/vnd.safetensors"}
        answer = await client.post("/v1/hidden_states", json={"input": f"A cat, number {number}"}, headers=headers)
        answer.raise_for_status()
        seconds.append(time.perf_counter() - started)
        await asyncio.sleep(PAUSE_S)
    return seconds


async def _keep_writing(client: httpx2.AsyncClient) -> None:
    for number in itertools.count():
        await _complete(client, _wanted(f"everything, {number}", GENERATION_TOKENS))
