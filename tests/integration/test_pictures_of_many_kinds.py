"""The diffusion service's engine in a real process: streams that are followed and left, LoRAs, memory that runs out,
and five hundred requests of every kind after which nothing is left behind."""

import base64
import io
import json
import random
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
from diffusion_bodies import HEADERS, WIDTH, message, states
from PIL import Image
from safetensors.numpy import save_file
from servers import Running, free_port, png_size, running, wait_until, zimage

pytestmark = pytest.mark.slow
EVENTS = {**HEADERS, "accept": "text/event-stream"}
LORAS = ("ink", "styles/oil", "chalk")
SLACK_BYTES = 32 << 20  # too little for what is decoded in tiles too
REQUESTS, WARM_UP, CLIENTS = 500, 120, 6
MOST_GROWTH_BYTES = 30 << 20  # in each half of the requests: once an allocator may take more, a leak always does
LONG = {"width": 512, "height": 512, "steps": 100}


def write_lora(path: Path, seed: int) -> None:
    """A LoRA of the tiny checkpoint: a change to a few of its layers."""
    numbers = np.random.default_rng(seed)
    tensors = {}
    for layer in ("layers.0.attention.to_q", "layers.1.attention.to_v", "layers.1.attention.to_out.0"):
        base = f"diffusion_model.{layer}"
        tensors[f"{base}.lora_A.weight"] = (0.3 * numbers.standard_normal((4, WIDTH))).astype("float32")
        tensors[f"{base}.lora_B.weight"] = (0.3 * numbers.standard_normal((WIDTH, 4))).astype("float32")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"title": path.stem})


@pytest.fixture(scope="module")
def node(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`zimage node diffusion` with a folder of LoRAs."""
    data_dir, port = tmp_path_factory.mktemp("engine"), free_port()
    for seed, name in enumerate(LORAS):
        write_lora(data_dir / "loras" / f"{name}.safetensors", seed)
    command = zimage("node", "diffusion", "--model-path", tiny_checkpoint, "--port", str(port))
    with running(command, port, data_dir, ZIMAGE_LORA_DIR=str(data_dir / "loras")) as started:
        started.wait_ready()
        yield started


@pytest.fixture
def client(node: Running) -> Iterator[httpx2.Client]:
    with node.client() as client:
        yield client


def draw(client: httpx2.Client, text: Any = None, **fields: Any) -> httpx2.Response:
    body = message(fields, text=states() if text is None else text)
    return client.post("/v1/generate", content=body, headers=HEADERS)


def pixels(answer: httpx2.Response) -> Any:
    assert answer.status_code == 200, answer.text
    with Image.open(io.BytesIO(answer.content)) as image:
        return np.asarray(image).astype(int)


def is_idle(client: httpx2.Client) -> bool:
    queue = client.get("/v1/queue").json()
    return not queue["running"] and not queue["waiting"]


class TestStreams:
    """Events of a picture over a socket."""

    def test_they_come_while_the_picture_is_made(self, client: httpx2.Client) -> None:
        body = message({"steps": 6, "preview_every": 2}, text=states())
        names, seen_running = [], False
        with client.stream("POST", "/v1/generate", content=body, headers=EVENTS) as answer:
            for event in httpx2.EventSource(answer):
                names.append(event.event)
                if event.event == "done":
                    png = base64.b64decode(json.loads(event.data)["image_b64"])
                seen_running = seen_running or not is_idle(client)
        assert names[0] == "queued"
        assert names[-1] == "done"
        assert (names.count("step"), names.count("preview")) == (6, 2)
        assert png_size(png) == (64, 32)

    def test_leaving_one_frees_the_device(self, node: Running, client: httpx2.Client) -> None:
        headers = {**EVENTS, "x-request-id": "left-stream"}
        with client.stream("POST", "/v1/generate", content=message(LONG, text=states()), headers=headers) as answer:
            events = iter(httpx2.EventSource(answer))
            while next(events).event != "step":
                pass
        wait_until(lambda: is_idle(client), "nothing is made any more")
        told = [one for one in node_events(node) if one.get("request_id") == "left-stream"]
        (cancelled,) = [one for one in told if one["event"] == "picture cancelled"]
        assert cancelled["step"] < LONG["steps"]

    def test_cancelling_one_ends_it_with_an_error(self, client: httpx2.Client) -> None:
        headers = {**EVENTS, "x-request-id": "cancelled-stream"}
        with client.stream("POST", "/v1/generate", content=message(LONG, text=states()), headers=headers) as answer:
            events = iter(httpx2.EventSource(answer))
            first = next(events)
            request_id = json.loads(first.data)["id"]
            assert (first.event, request_id) == ("queued", "cancelled-stream")
            while next(events).event != "step":
                pass
            assert client.delete(f"/v1/generate/{request_id}").json() == {"cancelled": request_id}
            *_, last = events
        assert last.event == "error"
        assert json.loads(last.data)["code"] == "cancelled"
        wait_until(lambda: is_idle(client), "nothing is made any more")


def node_events(node: Running) -> list[dict[str, Any]]:
    """The lines of the node's output that are JSON."""
    lines = [line for line in node.output.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines]


class TestLoras:
    """LoRAs of the folder, in requests side by side."""

    def test_they_are_listed(self, client: httpx2.Client) -> None:
        listed = {one["name"]: one for one in client.get("/v1/loras").json()["loras"]}
        assert set(listed) == set(LORAS)
        assert listed["ink"]["rank"] == 4
        assert listed["styles/oil"]["metadata"] == {"title": "oil"}
        assert all(one["default"] is None for one in listed.values())

    def test_each_request_has_its_own(self, client: httpx2.Client) -> None:
        wanted: list[list[dict[str, Any]] | None] = [
            None,
            [],
            [{"name": "ink"}],
            [{"name": "ink", "scale": 0.4}],
            [{"name": "styles/oil", "scale": -1.0}],
            [{"name": "ink"}, {"name": "chalk", "scale": 0.5}],
            [{"name": "chalk", "scale": 0}],
        ]
        alone = [pixels(draw(client, loras=loras, steps=6)) for loras in wanted]
        with ThreadPoolExecutor(len(wanted)) as pool:
            together = list(pool.map(lambda loras: pixels(draw(client, loras=loras, steps=6)), wanted))
        for one, other in zip(alone, together, strict=True):
            assert np.abs(one - other).max() <= 1
        base = alone[0]
        assert np.array_equal(alone[1], base)
        assert np.array_equal(alone[6], base)
        assert all(np.abs(other - base).max() > 5 for other in alone[2:6])
        assert np.abs(alone[2] - alone[3]).max() > 5

    @pytest.mark.parametrize("name", ["nope", "../loras/ink", "/etc/passwd", "ink.safetensors"])
    def test_names_that_are_not_there(self, client: httpx2.Client, name: str) -> None:
        refused = draw(client, loras=[{"name": name}])
        assert (refused.status_code, refused.json()["code"]) == (404, "not_found")

    def test_a_file_that_cannot_be_used(self, node: Running, client: httpx2.Client) -> None:
        path = node.data_dir / "loras" / "foreign.safetensors"
        save_file({"diffusion_model.nowhere.lora_A.weight": np.ones((2, 2), "float32")}, path)
        refused = draw(client, loras=[{"name": "foreign"}])
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_field")
        assert str(node.data_dir) not in refused.text
        path.unlink()
        assert draw(client, loras=[{"name": "ink"}]).status_code == 200


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="the limit of another process is Linux's")
def test_memory_that_runs_out_fails_one_picture_and_the_next_works(node: Running, client: httpx2.Client) -> None:
    process = service(node)
    before = resource.prlimit(process.pid, resource.RLIMIT_AS)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (process.memory_info().vms + SLACK_BYTES, before[1]))
    try:
        refused = draw(client, width=1536, height=1536, steps=1)
        assert (refused.status_code, refused.json()["code"]) == (503, "out_of_memory"), refused.text
        assert int(refused.headers["retry-after"]) > 0
        assert png_size(draw(client).content) == (64, 32)
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_AS, before)
    assert png_size(draw(client, width=1536, height=1536, steps=1).content) == (1536, 1536)
    assert service(node).pid == process.pid


def service(node: Running) -> psutil.Process:
    """The node's own process, which the command becomes."""
    return psutil.Process(node.process.pid)


@pytest.mark.timeout(600)
def test_after_many_requests_of_every_kind_nothing_is_left_behind(node: Running, client: httpx2.Client) -> None:
    process, source = service(node), random.Random(5)
    kinds = [source.randrange(10**6) for _ in range(REQUESTS)]
    play(node, kinds[:WARM_UP])
    wait_until(lambda: is_idle(client), "nothing is made any more")
    held, threads, descriptors = [process.memory_info().rss], process.num_threads(), open_files(process)
    statuses: list[Any] = []
    half = (REQUESTS - WARM_UP) // 2
    for start in (WARM_UP, WARM_UP + half):
        statuses += play(node, kinds[start : start + half])
        wait_until(lambda: is_idle(client), "nothing is made any more")
        held.append(process.memory_info().rss)
    assert set(statuses) <= {200, 409, 504, "left"}, statuses
    assert statuses.count(200) > len(statuses) // 2
    assert statuses.count(409) > 0
    assert statuses.count("left") > 0
    wait_until(lambda: process.num_threads() <= threads, f"at most {threads} threads are left")
    wait_until(lambda: open_files(process) <= descriptors, f"at most {descriptors} files are open")
    assert min(after - before for before, after in pairwise(held)) < MOST_GROWTH_BYTES, held
    assert png_size(draw(client).content) == (64, 32)
    assert "Traceback" not in node.output


def open_files(process: psutil.Process) -> int:
    """Open file descriptors without those of idle connections, which come and go with clients."""
    return process.num_fds() - len(process.net_connections())


def play(node: Running, kinds: list[int]) -> list[int | str]:
    """One request for each number, several at a time; what came of each."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(lambda kind: request(node, kind), kinds))


def request(node: Running, kind: int) -> int | str:
    """A request that the number decides: sizes, steps, guidance, LoRAs, deadlines; some are cancelled or left."""
    source = random.Random(kind)
    fields = {
        "width": 16 * source.randint(1, 12),
        "height": 16 * source.randint(1, 12),
        "steps": source.randint(1, 8),
        "seed": kind,
        "guidance_scale": source.choice([0.0, 0.0, 2.5]),
        "cfg_truncation": source.choice([1.0, 0.5]),
        "priority": source.choice(["low", "normal", "high"]),
        "preview_every": source.choice([0, 2]),
        "loras": [
            {"name": name, "scale": source.uniform(-1, 1)} for name in source.sample(LORAS, source.randint(0, 2))
        ],
        "timeout_s": source.choice([60.0, 60.0, 60.0, 0.05]),
    }
    body = message(fields, text=states(source.randint(1, 80), WIDTH), negative=states(source.randint(1, 40), WIDTH))
    with node.client() as client:
        match kind % 8:
            case 0:
                return cancelled(client, body, f"soak-{kind}")
            case 1:
                return left(client, body)
            case 2 | 3:
                return streamed(client, body)
            case _:
                return client.post("/v1/generate", content=body, headers=HEADERS).status_code


def cancelled(client: httpx2.Client, body: bytes, request_id: str) -> int:
    """A long picture that is cancelled by another connection."""
    gone = threading.Timer(0.05, lambda: httpx2.delete(f"{client.base_url}/v1/generate/{request_id}"))
    gone.start()
    answer = client.post("/v1/generate", content=body, headers={**HEADERS, "x-request-id": request_id})
    gone.join()
    return answer.status_code


def left(client: httpx2.Client, body: bytes) -> str | int:
    """A stream that is left after its first event."""
    with client.stream("POST", "/v1/generate", content=body, headers=EVENTS) as answer:
        if answer.is_success:
            next(iter(httpx2.EventSource(answer)))
        return "left" if answer.is_success else answer.status_code


def streamed(client: httpx2.Client, body: bytes) -> int:
    """A stream that is followed to its end."""
    with client.stream("POST", "/v1/generate", content=body, headers=EVENTS) as answer:
        if not answer.is_success:
            return answer.status_code
        *_, last = httpx2.EventSource(answer)
    return 200 if last.event == "done" else int(json.loads(last.data)["status"])
