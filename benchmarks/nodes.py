"""What more encoder nodes bring, and what clients notice when one of them is killed, stopped or slowed."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx2
import psutil  # type: ignore[import-untyped]

from benchmarks.encode import Connection, prompts
from benchmarks.processes import Server, free_port, started
from benchmarks.results import Figure, Findings, percentile
from benchmarks.setting import Setting
from zimage.checkpoints import make_checkpoint

NAME = "nodes"
NODES = 3
ENCODE_S = 0.02  # what a throttled stub needs for each encode
REQUESTS, QUICK_REQUESTS = 600, 150
CLIENTS, FAULT_CLIENTS = 12, 4
GAIN_AIM, SLOWER_AIM, BACK_AIM_S = 2.5, 3.0, 10.0


def run(setting: Setting) -> Findings:
    """Stubs of the same rate for the gain, real encoders for the faults."""
    requests = QUICK_REQUESTS if setting.quick else REQUESTS
    rates = [_rate(setting, count, requests) for count in (1, NODES)]
    taken, back_s = _faults(setting, requests)
    normal = percentile(taken["normal"], 0.99)
    figures = [
        Figure(benchmark=NAME, what="3 throttled / 1", value=rates[1] / rates[0], aim=GAIN_AIM, better="more"),
        Figure(benchmark=NAME, what="all well, p99", value=1000 * normal, unit="ms"),
        *(
            Figure(
                benchmark=NAME,
                what=f"one {fault}, p99 / all well",
                value=percentile(seconds, 0.99) / normal,
                aim=SLOWER_AIM,
            )
            for fault, seconds in taken.items()
            if fault != "normal"
        ),
        *(
            Figure(benchmark=NAME, what=f"back after it was {fault}", value=seconds, unit="s", aim=BACK_AIM_S)
            for fault, seconds in back_s.items()
        ),
    ]
    return Findings(figures, {"per_s": rates, "seconds": taken})


def _rate(setting: Setting, count: int, requests: int) -> float:
    """Encodes a second with so many throttled stubs."""
    with ExitStack() as stack:
        ports = [free_port() for _ in range(count)]
        for port in ports:
            stub = ["benchmarks.stub", str(port), str(ENCODE_S)]
            stack.enter_context(started(stub, port, setting.data_dir / f"bench-stub-{port}.log"))
        url = stack.enter_context(_gateway(setting, ports)).url
        asyncio.run(_load(url, requests // 4, CLIENTS))  # warms up
        began = time.perf_counter()
        asyncio.run(_load(url, requests, CLIENTS))
        return requests / (time.perf_counter() - began)


def _faults(setting: Setting, requests: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The seconds of each request while a node is disturbed, and how long nodes needed to be back."""
    model = make_checkpoint(setting.data_dir / "checkpoints" / "tiny")
    ports = [free_port() for _ in range(NODES)]
    taken, back_s = {}, {}
    with ExitStack() as stack:
        nodes = [stack.enter_context(_encoder(setting, model, port)) for port in ports]
        gateway = stack.enter_context(_gateway(setting, ports))
        asyncio.run(_load(gateway.url, requests // 2, FAULT_CLIENTS))  # warms up
        taken["normal"] = asyncio.run(_load(gateway.url, requests, FAULT_CLIENTS))
        taken["stopped"] = asyncio.run(_load(gateway.url, requests, FAULT_CLIENTS, nodes[0].process.suspend))
        _until(gateway, lambda ready: ready < NODES)
        nodes[0].process.resume()
        back_s["stopped"] = _until(gateway, lambda ready: ready == NODES)
        with _slowed(nodes[1].process) as begin:
            taken["slowed"] = asyncio.run(_load(gateway.url, requests, FAULT_CLIENTS, begin))
        _until(gateway, lambda ready: ready == NODES)
        taken["killed"] = asyncio.run(_load(gateway.url, requests, FAULT_CLIENTS, nodes[2].process.kill))
        _until(gateway, lambda ready: ready < NODES)
        stack.enter_context(_encoder(setting, model, ports[2]))
        back_s["killed"] = _until(gateway, lambda ready: ready == NODES)
    return taken, back_s


@contextmanager
def _encoder(setting: Setting, model: object, port: int) -> Iterator[Server]:
    told = {"ZIMAGE_MODEL_PATH": str(model), "ZIMAGE_ENCODER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with started(["services.encoder"], port, setting.data_dir / f"bench-encoder-{port}.log", **told) as server:
        yield server


@contextmanager
def _gateway(setting: Setting, ports: list[int]) -> Iterator[Server]:
    port, urls = free_port(), ",".join(f"http://127.0.0.1:{one}" for one in ports)
    told = {"ZIMAGE_PORT": str(port), "ZIMAGE_ENCODER_URLS": urls, "ZIMAGE_ENCODER_ONLY": "true"}
    with started(["services.gateway"], port, setting.data_dir / "bench-gateway.log", **told) as server:
        _until(server, lambda ready: ready == len(ports))
        yield server


@contextmanager
def _slowed(process: psutil.Process) -> Iterator[Callable[[], None]]:
    """What it hands out makes the process run for a tenth of the time, until the end."""
    over = threading.Event()

    def slow() -> None:
        while not over.wait(0.01):
            process.suspend()
            over.wait(0.09)
            process.resume()

    thread = threading.Thread(target=slow)
    try:
        yield thread.start
    finally:
        over.set()
        thread.join()


def _until(gateway: Server, enough: Callable[[int], bool], timeout_s: float = 60.0) -> float:
    """The seconds until so many encoders are ready."""
    began = time.perf_counter()
    with httpx2.Client(base_url=gateway.url, trust_env=False) as client:
        while not enough(client.get("/health").json()["services"]["encoder"]["ready_nodes"]):
            if time.perf_counter() > began + timeout_s:
                raise RuntimeError("the nodes do not become what they should")
            time.sleep(0.02)
    return time.perf_counter() - began


async def _load(url: str, requests: int, clients: int, act: Callable[[], object] = lambda: None) -> list[float]:
    """The seconds of each request; after a quarter of them something is done. Raises RuntimeError for any error."""
    texts, taken = itertools.islice(prompts(), requests), list[float]()
    connections = [await Connection.open(url) for _ in range(clients)]

    async def work(connection: Connection) -> None:
        for text in texts:
            began = time.perf_counter()
            await connection.post("/api/encode", {"prompt": text})
            taken.append(time.perf_counter() - began)
            if len(taken) == requests // 4:
                act()

    async with asyncio.TaskGroup() as tasks:
        for connection in connections:
            tasks.create_task(work(connection))
    for connection in connections:
        connection.close()
    return taken
