"""Vision conditioning through a whole server: the acceptance checks, the specification's examples, restarts."""

import base64
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pictures import encoded, malformed, pixels
from servers import Running, free_port, picture, png_size, run, serve, shared_file, zimage

pytestmark = pytest.mark.slow
IMAGE = base64.b64encode(encoded()).decode()
MALFORMED, SENDERS = 1_000, 4
GROWTH_BYTES = 50_000_000


@pytest.fixture(scope="module")
def seeing(
    tiny_checkpoint: Path, tiny_vision_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    small = {"ZIMAGE_WIDTH": "64", "ZIMAGE_HEIGHT": "64", "ZIMAGE_STEPS": "2"}  # of pictures that name no size
    flags = ("--vl-model-path", str(tiny_vision_checkpoint))
    with serve(tiny_checkpoint, tmp_path_factory.mktemp("seeing"), *flags, **small) as started:
        yield started


@pytest.fixture
def eyes(seeing: Running) -> Iterator[httpx2.Client]:
    with seeing.client() as client:
        yield client


def extracted(client: httpx2.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/api/vl/extract", json={"image": IMAGE, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def drawn(client: httpx2.Client, **fields: Any) -> httpx2.Response:
    answer = client.post("/api/vl/generate", json=picture(**fields))
    assert answer.status_code == 200, answer.text
    return answer


def test_conformance(seeing: Running, tmp_path: Path) -> None:
    script = shared_file("acceptance/conformance.py")
    command = [sys.executable, str(script), seeing.url, "--size", "64", "--only", "vl."]
    ended = run(command, tmp_path, timeout_s=200)
    assert re.search(r"^6 passed, 0 failed, 0 skipped$", ended.stdout, re.MULTILINE), ended.stdout + ended.stderr


def test_the_specification_s_workflows(
    seeing: Running, eyes: httpx2.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both scripts as they stand, one after the other; only where `localhost:7860` leads is ours."""
    text = shared_file("spec/web_server_api.md").read_text()
    scripts = re.findall(r"```python\n(.*?)```", text[text.index("### VL Workflow Example") :], re.DOTALL)
    assert len(scripts) == 2
    looked_up = socket.getaddrinfo

    def ours(host: str, port: int, *more: Any, **named: Any) -> Any:
        assert (host, port) == ("localhost", 7860)
        return looked_up("127.0.0.1", int(seeing.url.rpartition(":")[2]), *more, **named)

    (tmp_path / "reference.jpg").write_bytes(encoded(kind="JPEG"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "localhost")
    eyes.delete("/api/vl/cache")
    names: dict[str, Any] = {}
    with monkeypatch.context() as leading:
        leading.setattr(socket, "getaddrinfo", ours)
        for script in scripts:
            exec(compile(script, "a script of the specification", "exec"), names)  # noqa: S102 - it is the test
    pictures = [(tmp_path / f"output_{seed}.png").read_bytes() for seed in (42, 123, 456)]
    assert [png_size(picture) for picture in pictures] == [(64, 64)] * 3
    assert len(set(pictures)) == 3
    assert names["extract_resp"].json()["num_tokens"] > 0
    headers = names["gen_resp"].headers
    assert (headers["x-vl-alpha"], headers["x-vl-blend-mode"]) == ("0.3", "linear")
    assert png_size(names["gen_resp"].content) == (64, 64)
    entries = eyes.get("/api/history?images=none").json()["history"][-4:]
    assert [entry["vl_blend_mode"] for entry in entries] == ["style_only"] * 3 + ["linear"]
    assert {entry["vl_embeddings_id"] for entry in entries[:3]} == {names["embeddings_id"]}
    kept = eyes.get("/api/vl/status").json()["cached_embeddings"]
    assert kept == [entries[3]["vl_embeddings_id"]], "the first script deletes what it had extracted"


def test_a_form_is_the_same_as_json(eyes: httpx2.Client) -> None:
    wanted = {"hidden_layer": -3, "image_tokens_only": True, "scale_to_text": False, "text": "a cat"}
    as_json = extracted(eyes, **wanted)
    fields = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in wanted.items()}
    as_form = eyes.post("/api/vl/extract", files={"image": ("x.png", encoded())}, data=fields)
    assert as_form.status_code == 200, as_form.text
    assert {**as_form.json(), "extract_time": 0} == {**as_json, "extract_time": 0}
    data_url = extracted(eyes, **wanted, image=f"data:image/png;base64,{IMAGE}")
    assert data_url["embeddings_id"] == as_json["embeddings_id"]
    for files, data in (
        ({}, {"text": "x"}),
        ({"image": ("x", b"GIF89a")}, {}),
        ({"image": ("x", encoded())}, {"a": "b"}),
    ):
        answer = eyes.post("/api/vl/extract", files=files or {"other": b"x"}, data=data)
        assert answer.status_code == 422, answer.text


def test_the_picture_can_be_made_again_from_history(eyes: httpx2.Client) -> None:
    answer = drawn(eyes, vl_image=IMAGE, vl_alpha=0.4, vl_blend_mode="graduated", vl_outlier_masking="clamp")
    entry = eyes.get("/api/history?images=none").json()["history"][-1]
    assert (entry["vl_alpha"], entry["vl_blend_mode"], entry["vl_outlier_masking"]) == (0.4, "graduated", "clamp")
    assert entry["vl_embeddings_id"].startswith("vl_")
    assert "vl_image" not in entry
    names = [name for name, value in entry.items() if name.startswith("vl_") and value is not None]
    again = drawn(eyes, **{name: entry[name] for name in (*names, "seed", "width", "height", "steps")})
    assert again.content == answer.content
    assert IMAGE.encode() not in answer.content


def test_several_references(eyes: httpx2.Client) -> None:
    other = base64.b64encode(encoded(pixels(80, 80, seed=4))).decode()
    embeddings_id = extracted(eyes)["embeddings_id"]
    both = [{"embeddings_id": embeddings_id, "alpha": 0.3}, {"image": other, "alpha": 0.2}]
    answer = drawn(eyes, vl_references=both)
    assert answer.headers["x-vl-alpha"] == "0.5"
    alone = drawn(eyes, vl_references=both[:1])
    assert alone.content != answer.content
    one = drawn(eyes, vl_embeddings_id=embeddings_id, vl_alpha=0.3)
    header_and_pixels = [reply.content[reply.content.index(b"IDAT") :] for reply in (alone, one)]
    assert header_and_pixels[0] == header_and_pixels[1]
    kept = eyes.get("/api/history?images=none").json()["history"][-2]["vl_references"]
    assert [reference["alpha"] for reference in kept] == [0.3]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 422),
        ({"vl_embeddings_id": "vl_0_0_L-2"}, 404),
        ({"vl_embeddings_id": "../../etc/passwd"}, 404),
        ({"vl_image": "http://127.0.0.1/x.png"}, 422),
        ({"vl_image": IMAGE, "vl_alpha": 1.5}, 422),
        ({"vl_image": IMAGE, "vl_hidden_layer": -7}, 422),
        ({"vl_image": IMAGE, "vl_blend_mode": "nope"}, 422),
        ({"vl_image": IMAGE, "vl_outlier_masking": "nope"}, 422),
        ({"vl_image": IMAGE, "vl_style_share": 0}, 422),
        ({"vl_references": []}, 422),
        ({"vl_references": [{"alpha": 0.5}]}, 422),
        ({"vl_references": [{"image": IMAGE, "embeddings_id": "x", "alpha": 0.5}]}, 422),
        ({"vl_references": [{"image": IMAGE, "alpha": 0.6}] * 2}, 422),
        ({"vl_references": [{"image": IMAGE, "alpha": 0.1}] * 5}, 422),
        ({"vl_references": [{"image": IMAGE, "alpha": 0.5}], "vl_image": IMAGE}, 422),
        ({"vl_image": "A" * 40_000_000}, 413),
    ],
)
def test_what_is_refused(eyes: httpx2.Client, fields: dict[str, Any], status: int) -> None:
    answer = eyes.post("/api/vl/generate", json=picture(**fields))
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.json()["detail"]


def test_a_picture_is_described(eyes: httpx2.Client) -> None:
    body = {"prompt": "Describe the picture.", "image": IMAGE, "max_tokens": 8, "temperature": 0}
    answer = eyes.post("/api/rewrite", json=body)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["original_prompt"], answer.json()["backend"]) == (body["prompt"], "local")
    templated = eyes.post("/api/rewrite", json={**body, "rewriter": "rewriter_general"})
    assert templated.json()["rewriter"] == "rewriter_general"
    followed = eyes.post("/api/rewrite", json={**body, "seed": 1}, headers={"accept": "text/event-stream"}).text
    assert followed.count("event: text") + followed.count("event: thinking") >= 1
    assert followed.rindex("event: done") > followed.rindex("event: t")
    assert eyes.post("/api/rewrite", json={**body, "image": "x"}).status_code == 422
    assert eyes.post("/api/rewrite", json={**body, "rewriter": "nope"}).status_code == 404


def test_one_picture_at_the_same_time_is_read_once(seeing: Running, eyes: httpx2.Client) -> None:
    image = base64.b64encode(encoded(pixels(224, 160, seed=11))).decode()
    shot = {"image_tokens_only": False, "hidden_layer": -2, "scale_to_text": True}

    def extract(_: int) -> str:
        return str(extracted(eyes, image=image, **shot)["embeddings_id"])

    def draw(_: int) -> str:
        drawn(eyes, vl_image=image, vl_alpha=0.5)
        return str(eyes.get("/api/history?images=none").json()["history"][-1]["vl_embeddings_id"])

    with seeing.service_client("vl") as vl, ThreadPoolExecutor(6) as clients:
        before = extractions(vl)
        found = [*clients.map(extract, range(4)), *clients.map(draw, range(2))]
        assert extractions(vl) == before + 1
    assert len(set(found)) == 1


def extractions(vl: httpx2.Client) -> int:
    counted = re.findall(r'zimage_requests_total\{.*route="/v1/extract".*\} ([0-9.]+)', vl.get("/metrics").text)
    return sum(int(float(count)) for count in counted)


def test_malformed_pictures_cost_nothing(seeing: Running, eyes: httpx2.Client) -> None:
    """As JSON and as a form in turns, some at a time, with what all processes together hold looked at on the way."""

    def send(index: int, data: bytes) -> int:
        if index % 2:
            return eyes.post("/api/vl/extract", json={"image": base64.b64encode(data).decode()}).status_code
        return eyes.post("/api/vl/extract", files={"image": ("x.png", data)}).status_code

    def held() -> int:
        return sum(process.memory_info().rss for process in seeing.processes())

    with ThreadPoolExecutor(SENDERS) as pool:
        list(pool.map(send, *zip(*enumerate(malformed(60, seed=1)), strict=True)))
        extracted(eyes, image=base64.b64encode(encoded(pixels(512, 512))).decode())
        before, most, statuses = held(), 0, Counter[int]()
        answers = pool.map(send, *zip(*enumerate(malformed(MALFORMED)), strict=True))
        for index, status in enumerate(answers):
            statuses[status] += 1
            if index % 20 == 0:
                most = max(most, held())
    assert set(statuses) <= {200, 413, 422}, statuses
    assert statuses[422] > MALFORMED * 0.7
    assert max(most, held()) - before < GROWTH_BYTES
    extracted(eyes)


def test_large_bodies_are_for_pictures_only(eyes: httpx2.Client) -> None:
    body = {"prompt": "x", "negative_prompt": "y" * 3_000_000}
    assert eyes.post("/api/generate", json=body).status_code == 413
    assert eyes.post("/api/vl/generate", json=body).status_code == 422


def test_without_a_model_the_status_says_so(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with serve(tiny_checkpoint, tmp_path / "data") as started, started.client() as client:
        status = client.get("/api/vl/status").json()
        assert (status["configured"], status["available"], status["cached_embeddings"]) == (False, False, [])
        assert client.get("/api/vl/config").json()["alpha"] == 0.3
        answers = [
            client.post("/api/vl/extract", json={"image": IMAGE}),
            client.post("/api/vl/generate", json=picture(vl_image=IMAGE)),
            client.delete("/api/vl/cache"),
            client.delete("/api/vl/cache/vl_0_0_L-2"),
            client.post("/api/rewrite", json={"prompt": "What is it?", "image": IMAGE}),
        ]
        assert {answer.status_code for answer in answers} == {503}
        assert len({answer.json()["detail"] for answer in answers}) == 1


def test_ids_outlive_a_restart_of_everything(
    tiny_checkpoint: Path, tiny_vision_checkpoint: Path, tmp_path: Path
) -> None:
    flags = ("--vl-model-path", str(tiny_vision_checkpoint))
    with serve(tiny_checkpoint, tmp_path, *flags) as started, started.client() as client:
        before = extracted(client)
        first = drawn(client, vl_embeddings_id=before["embeddings_id"], vl_alpha=0.5)
    with serve(tiny_checkpoint, tmp_path, *flags) as started, started.client() as client:
        assert client.get("/api/vl/status").json()["cached_embeddings"] == [before["embeddings_id"]]
        again = drawn(client, vl_embeddings_id=before["embeddings_id"], vl_alpha=0.5)
        assert again.content == first.content
        assert extracted(client)["embeddings_id"] == before["embeddings_id"]
        client.delete("/api/vl/cache")
        assert extracted(client)["embeddings_id"] == before["embeddings_id"]


def test_a_path_that_holds_no_model_ends_the_start(tiny_checkpoint: Path, tmp_path: Path) -> None:
    ended = run(
        zimage("serve", "--model-path", tiny_checkpoint, "--port", str(free_port()), "--vl-model-path", str(tmp_path)),
        tmp_path,
    )
    assert ended.status != 0
    assert "--vl-model-path" in ended.stderr
