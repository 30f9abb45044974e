"""History through the public API, and what becomes of it when processes die."""

import base64
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx2
import psutil
import pytest
from embedded_redis import embedded_redis
from servers import Running, free_port, picture, png_size, running, serve, wait_until, zimage

pytestmark = pytest.mark.slow
CLIENTS, PICTURES = 8, 200
AWAY_S = 20.0  # longer than connections wait and than /health remembers
VICTIMS = ("valkey", "services.gateway", "redis_server", "services.encoder", "services.diffusion", "valkey")


@pytest.fixture(scope="module")
def own(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose history these tests may clear."""
    with serve(tiny_checkpoint, tmp_path_factory.mktemp("history")) as server:
        yield server


def text_chunk(png: bytes) -> dict[str, object]:
    """The parameters that a PNG carries."""
    at = png.index(b"tEXtzimage\0")
    length = int.from_bytes(png[at - 4 : at])
    value: dict[str, object] = json.loads(png[at + 11 : at + 4 + length])
    return value


def test_a_picture_is_kept_with_what_made_it_and_can_be_made_again(own: Running) -> None:
    with own.client() as client:
        client.delete("/api/history").raise_for_status()
        made = client.post("/api/generate", json=picture(seed=None, system_prompt="You are a painter."))
        entry = client.get("/api/history").json()["history"][0]
        assert str(entry["id"]) == made.headers["x-history-id"]
        assert str(entry["seed"]) == made.headers["x-seed"]
        assert base64.b64decode(entry["image_b64"]) == made.content
        assert client.get(f"/api/history/{entry['id']}/image").content == made.content
        again = client.post("/api/generate", json=text_chunk(made.content))
        assert again.content == made.content


def test_pictures_come_only_when_they_are_asked_for(own: Running) -> None:
    with own.client() as client:
        client.delete("/api/history").raise_for_status()
        for seed in range(3):
            client.post("/api/generate", json=picture(seed=seed)).raise_for_status()
        none = client.get("/api/history", params={"images": "none", "limit": 2, "offset": 1})
        assert none.headers["x-total-count"] == "3"
        assert [entry["seed"] for entry in none.json()["history"]] == [1, 2]
        assert not {"image_b64", "thumb_b64"} & set(none.json()["history"][0])
        thumb = client.get("/api/history", params={"images": "thumb"}).json()["history"][0]["thumb_b64"]
        assert base64.b64decode(thumb).startswith(b"\xff\xd8\xff")


def test_saved_embeddings_are_the_tensor_that_was_measured(own: Running) -> None:
    import torch
    from safetensors.torch import load_file

    with own.client() as client:
        saved = client.post("/api/save-embeddings", json={"prompt": "A cat sleeping"}).json()
        encoded = client.post("/api/encode", json={"prompt": "A cat sleeping"}).json()
    tensor = load_file(saved["path"])["embeddings"]
    assert list(tensor.shape) == saved["shape"] == encoded["shape"]
    assert str(tensor.dtype) == encoded["dtype"]
    assert torch.isfinite(tensor).all()
    assert Path(saved["path"]).is_relative_to(own.data_dir)


def test_without_redis_no_picture_fails_and_history_heals(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """While it hangs, while it is gone, and after each."""
    enough = threading.Event()

    def draw_until_enough() -> list[httpx2.Response]:
        made = []
        with server.client() as own_client:
            while not enough.is_set():
                made.append(own_client.post("/api/generate", json=picture()))
        return made

    with (
        embedded_redis(tmp_path / "redis") as redis,
        serve(tiny_checkpoint, tmp_path, "--redis-url", redis.url, ZIMAGE_HISTORY_MAX_ENTRIES="100000") as server,
        server.client() as client,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        drawing = [pool.submit(draw_until_enough) for _ in range(CLIENTS)]
        try:
            for away in (redis.hanging, redis.gone):
                with away():
                    wait_until(lambda: client.get("/api/history").status_code == 503, "history cannot be reached")
                    assert client.get("/health/ready").status_code == 200
                    wait_until(lambda: client.get("/health").json()["status"] == "degraded", "/health tells it")
                    assert client.get("/health").json()["services"]["redis"]["status"] == "unreachable"
                    time.sleep(AWAY_S)
                wait_until(lambda: client.get("/api/history?images=none").status_code == 200, "history answers again")
                wait_until(
                    lambda: "x-history-id" in client.post("/api/generate", json=picture()).headers, "it is kept again"
                )
                wait_until(lambda: client.get("/health").json()["status"] == "healthy", "/health tells that, too")
        finally:
            enough.set()
        made = [answer for drawer in drawing for answer in drawer.result()]
        kept = Counter(entry["id"] for entry in client.get("/api/history?images=none").json()["history"])
    assert Counter(answer.status_code for answer in made) == {200: len(made)}
    assert any(answer.headers.get("x-history") == "unsaved" for answer in made)
    saved = [int(answer.headers["x-history-id"]) for answer in made if "x-history-id" in answer.headers]
    assert {kept[number] for number in saved} == {1}


class Client(threading.Thread):
    """Makes pictures until enough are made, through whatever happens to the server."""

    def __init__(self, url: str, made: list[tuple[str, int, bool]], lock: threading.Lock) -> None:
        super().__init__(daemon=True)
        self.url, self.made, self.lock = url, made, lock

    def run(self) -> None:
        end = time.monotonic() + 240
        with httpx2.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            while len(self.made) < PICTURES and time.monotonic() < end:
                with self.lock:
                    prompt = f"picture {random.getrandbits(64):x}"
                try:
                    response = client.post("/api/generate", json=picture(prompt=prompt))
                except httpx2.HTTPError:
                    time.sleep(0.1)
                    continue
                if response.status_code == 200:
                    assert png_size(response.content) == (64, 64)
                    saved = "x-history-id" in response.headers
                    self.made.append((prompt, int(response.headers.get("x-history-id", -1)), saved))
                else:
                    time.sleep(0.1)


def test_nothing_that_was_answered_is_lost_when_every_process_is_killed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    flags = ("--model-path", tiny_checkpoint, "--port", str(port), "--data-dir", tmp_path)
    command = zimage("serve", *flags)
    made: list[tuple[str, int, bool]] = []
    lock = threading.Lock()
    chance = random.Random(5)  # a repeatable order of events
    with running(command, port, tmp_path) as server:
        server.wait_ready()
        clients = [Client(server.url, made, lock) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        for victim in VICTIMS:
            reached = min(len(made) + chance.randrange(5, 20), PICTURES - 20)
            wait_until(lambda reached=reached: len(made) >= reached, f"more pictures before {victim} is killed")
            for process in server.processes():
                with suppress(psutil.Error):
                    if victim in " ".join(process.cmdline()):
                        process.kill()
        wait_until(lambda: len(made) >= PICTURES - 15, "nearly all pictures are made", timeout_s=180)
        server.kill()
    with running(command, port, tmp_path) as server:
        server.wait_ready()
        for client in clients:
            client.join(timeout=120)
        assert len(made) >= PICTURES
        with server.client() as reader:
            entries = reader.get("/api/history?images=none").json()["history"]
            first = entries[0]
            assert png_size(reader.get(f"/api/history/{first['id']}/image").content) == (64, 64)
    kept = [(entry["prompt"], entry["id"]) for entry in entries]
    assert len({number for _, number in kept}) == len(kept), "an id was used twice"
    lost = [prompt for prompt, number, _ in made if kept.count((prompt, number)) != 1]
    assert not lost, f"{len(lost)} of {len(made)} answered pictures are not in history exactly once"
