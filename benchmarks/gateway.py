"""How many requests a second pass through the gateway, against a pass-through of the same libraries without logic."""

import asyncio
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.encode import Connection
from benchmarks.processes import free_port, started
from benchmarks.results import Figure, Findings
from benchmarks.setting import Setting

NAME = "gateway"
CLIENTS = 64
REQUESTS, ROUNDS, QUICK_REQUESTS = 4_000, 5, 400  # requests a way in each round
AIM = 0.6
BODY = {"prompt": "A cat that sleeps in the sun"}


def run(setting: Setting) -> Findings:
    """Measures both before one stub of an encoder, in turn."""
    with _servers(setting) as (ours, theirs):
        rounds = asyncio.run(_rounds(ours, theirs, QUICK_REQUESTS if setting.quick else REQUESTS))
    ratio = statistics.median(one["gateway_per_s"] / one["passthrough_per_s"] for one in rounds)
    figures = [
        Figure(benchmark=NAME, what="gateway / pass-through, 64 clients", value=ratio, aim=AIM, better="more"),
        *(
            Figure(benchmark=NAME, what=label, value=statistics.median(one[key] for one in rounds), unit="/s")
            for label, key in (("gateway", "gateway_per_s"), ("pass-through", "passthrough_per_s"))
        ),
    ]
    return Findings(figures, {"rounds": rounds})


@contextmanager
def _servers(setting: Setting) -> Iterator[tuple[str, str]]:
    """The base URLs of a gateway and of a pass-through."""
    stub, ours, theirs = free_port(), free_port(), free_port()
    logs, url = setting.data_dir, f"http://127.0.0.1:{stub}"
    gateway = {"ZIMAGE_PORT": str(ours), "ZIMAGE_ENCODER_URLS": url, "ZIMAGE_ENCODER_ONLY": "true"}
    with ExitStack() as stack:
        stack.enter_context(started(["benchmarks.stub", str(stub)], stub, logs / "bench-stub.log"))
        stack.enter_context(started(["benchmarks.passthrough", str(theirs), url], theirs, logs / "bench-through.log"))
        stack.enter_context(started(["services.gateway"], ours, logs / "bench-gateway.log", **gateway))
        yield f"http://127.0.0.1:{ours}", f"http://127.0.0.1:{theirs}"


async def _rounds(ours: str, theirs: str, requests: int) -> list[dict[str, float]]:
    ways = {"gateway_per_s": ours, "passthrough_per_s": theirs}
    for url in ways.values():
        await _phase(url, requests // 4)  # warms up
    rounds = []
    for number in range(ROUNDS):
        order = [*ways.items()] if number % 2 else [*ways.items()][::-1]
        rounds.append({key: await _phase(url, requests) for key, url in order})
    return rounds


async def _phase(url: str, requests: int) -> float:
    """Requests a second, over new connections: servers close those that wait while the other is measured."""
    connections = [await Connection.open(url) for _ in range(CLIENTS)]
    left = iter(range(requests))

    async def work(connection: Connection) -> None:
        for _ in left:
            await connection.post("/api/encode", BODY)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for connection in connections:
            tasks.create_task(work(connection))
    seconds = time.perf_counter() - began
    for connection in connections:
        connection.close()
    return requests / seconds
