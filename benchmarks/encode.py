"""How many prompts are encoded a second: one client after the other, and sixteen at once, whom the encoder batches."""

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Iterator

from benchmarks.processes import serve
from benchmarks.results import Figure, Findings
from benchmarks.setting import Setting
from zimage.checkpoints import make_checkpoint

NAME = "encode"
CLIENTS = 16
PROMPTS, ROUNDS, QUICK_PROMPTS = 200, 3, 40  # prompts a way in each round
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
    count = QUICK_PROMPTS if quick else PROMPTS
    source = prompts()
    connections = [await Connection.open(url) for _ in range(CLIENTS)]
    await _phase(connections, list(itertools.islice(source, 2 * CLIENTS)))  # warms up
    rounds = []
    for number in range(ROUNDS):
        ways: list[tuple[str, int]] = [("alone_per_s", 1), ("together_per_s", CLIENTS)]
        taken = {}
        for key, clients in ways if number % 2 else reversed(ways):
            taken[key] = await _phase(connections[:clients], list(itertools.islice(source, count)))
        rounds.append(taken)
    for connection in connections:
        connection.close()
    return rounds


async def _phase(connections: list["Connection"], texts: list[str]) -> float:
    """Prompts a second."""
    left = iter(texts)

    async def work(connection: "Connection") -> None:
        for text in left:
            await connection.post("/api/encode", {"prompt": text})

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for connection in connections:
            tasks.create_task(work(connection))
    return len(texts) / (time.perf_counter() - started)


class Connection:
    """One client on one connection. It does next to nothing, as it takes its time from the cores that it measures."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, url: str) -> "Connection":
        """Connects to `http://host:port`."""
        host, _, port = url.removeprefix("http://").rstrip("/").rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def post(self, path: str, body: dict[str, str]) -> bytes:
        """The answer's body. Raises RuntimeError unless the status is 200."""
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        )
        self._writer.write(head.encode() + b"\r\n\r\n" + content)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        content = await self._reader.readexactly(length)
        if not answer.startswith(b"http/1.1 200 "):
            raise RuntimeError(f"the server answered {content!r}")
        return content

    def close(self) -> None:
        """Closes the connection."""
        self._writer.close()
