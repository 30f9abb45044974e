"""Rewriter nodes with each back end, before a gateway of their own: the acceptance checks and events over sockets."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from servers import Running, free_port, run, running, sent, shared_file, wait_until, zimage

pytestmark = pytest.mark.slow
EVENTS = {"accept": "text/event-stream"}
BODY = {"prompt": "A cat sleeping", "custom_system_prompt": "Expand the prompt.", "max_tokens": 24, "temperature": 0}


@contextmanager
def node(data_dir: Path, *flags: str | Path, **settings: str) -> Iterator[Running]:
    """`zimage node rewriter`, ready."""
    port = free_port()
    with running(zimage("node", "rewriter", "--port", str(port), *flags), port, data_dir, **settings) as started:
        started.wait_ready()
        yield started


@contextmanager
def gateway(data_dir: Path, rewriter: Running, encoder: Running) -> Iterator[Running]:
    """A gateway before that rewriter and an encoder, ready."""
    port = free_port()
    settings = {
        "ZIMAGE_PORT": str(port),
        "ZIMAGE_ENCODER_ONLY": "true",
        "ZIMAGE_ENCODER_URLS": encoder.url,
        "ZIMAGE_REWRITER_URLS": rewriter.url,
    }
    with running([sys.executable, "-m", "services.gateway"], port, data_dir, **settings) as started:
        started.wait_ready()
        yield started


@pytest.fixture(scope="module")
def other_server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URL and model of a server that is not ours and speaks the protocol: `transformers serve`."""
    data_dir = tmp_path_factory.mktemp("transformers")
    model = data_dir / "tiny"
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny_checkpoint / part, model, dirs_exist_ok=True)
    port = free_port()
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", str(model), "--port", str(port), "--device", "cpu"]
    with running(command, port, data_dir, HF_HUB_OFFLINE="1", HF_HOME=str(data_dir)) as started:

        def answers() -> bool:
            assert started.process.poll() is None, started.output
            try:
                return httpx2.get(f"{started.url}/health", trust_env=False, timeout=5).is_success
            except httpx2.HTTPError:
                return False

        wait_until(answers, "transformers serve answers", timeout_s=120)
        yield started.url, str(model)
        started.kill()  # its way to stop is its own


@pytest.fixture(scope="module", params=["local", "encoder", "api", "api of another server"])
def rewriting(
    request: pytest.FixtureRequest,
    nodes: dict[str, Running],
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Running, Running]]:
    """What answers call the back end, the rewriter, and the gateway before it."""
    data_dir, encoder = tmp_path_factory.mktemp("rewriter"), nodes["encoder"]
    flags: tuple[str | Path, ...] = ()
    match request.param:
        case "local":
            flags, settings = ("--model-path", tiny_checkpoint, "--device", "cpu"), {}
        case "encoder":
            settings = {"ZIMAGE_REWRITER_BACKEND": "encoder", "ZIMAGE_ENCODER_URLS": encoder.url}
        case "api":
            settings = {"ZIMAGE_REWRITER_USE_API": "true", "ZIMAGE_REWRITER_API_URL": f"{encoder.url}/v1"}
        case _:
            url, model = request.getfixturevalue("other_server")
            settings = {
                "ZIMAGE_REWRITER_USE_API": "true",
                "ZIMAGE_REWRITER_API_URL": url,
                "ZIMAGE_REWRITER_API_MODEL": model,
            }
    with ExitStack() as stack:
        rewriter = stack.enter_context(node(data_dir, *flags, **settings))
        yield (
            "api" if request.param.startswith("api") else "local",
            rewriter,
            stack.enter_context(gateway(data_dir, rewriter, encoder)),
        )


def test_conformance(rewriting: tuple[str, Running, Running], tmp_path: Path) -> None:
    script = shared_file("acceptance/conformance.py")
    ended = run([sys.executable, str(script), rewriting[2].url, "--only", "rewrite."], tmp_path, timeout_s=200)
    assert re.search(r"^2 passed, 0 failed, 0 skipped$", ended.stdout, re.MULTILINE), ended.stdout + ended.stderr


def test_events(rewriting: tuple[str, Running, Running]) -> None:
    name, _, started = rewriting
    with started.client() as client:
        whole = client.post("/api/rewrite", json=BODY).json()
        assert whole["backend"] == name
        found: list[tuple[str, Any]] = []
        with client.stream("POST", "/api/rewrite", json=BODY, headers=EVENTS) as answer:
            assert answer.status_code == 200
            found = [(event.event, json.loads(event.data)) for event in httpx2.EventSource(answer)]
    assert {event for event, _ in found[:-1]} <= {"thinking", "text"}
    event, done = found[-1]
    assert event == "done"
    assert {**done, "gen_time": 0, "seed": None} == {**whole, "gen_time": 0, "seed": None}
    assert "".join(data["text"] for event, data in found if event == "text") == whole["rewritten_prompt"]


def test_the_process_has_torch_only_where_it_writes_itself(rewriting: tuple[str, Running, Running]) -> None:
    _, rewriter, _ = rewriting
    (process,) = rewriter.processes()
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        pytest.skip("this system does not tell which libraries a process has loaded")
    assert ("libtorch" in maps.read_text()) is ("--model-path" in " ".join(rewriter.process.args))  # type: ignore[arg-type]


def writing(started: Running, metric: str) -> float:
    with started.client() as client:
        found = re.search(rf"^{metric}{{.*}} (.*)$", client.get("/metrics").text, re.MULTILINE)
    assert found, metric
    return float(found[1])


def test_a_client_that_goes_away_ends_its_text(
    rewriting: tuple[str, Running, Running], nodes: dict[str, Running], request: pytest.FixtureRequest
) -> None:
    """Through gateway, rewriter and, where it writes elsewhere, that server, the text ends."""
    if "another" in request.node.name:
        pytest.skip("another server's texts are its own affair")
    _, rewriter, started = rewriting
    local = "[local]" in request.node.name
    writer, metric = (rewriter, "zimage_rewriter_writing") if local else (nodes["encoder"], "zimage_encoder_writing")
    body = {**BODY, "max_tokens": 20_000}
    with sent(started.url, "/api/rewrite", body):
        wait_until(lambda: writing(writer, metric) == 1, "a text that is being written")
    wait_until(lambda: writing(writer, metric) == 0, "nothing that is being written")


def test_a_server_that_is_gone_is_told_in_one_sentence(nodes: dict[str, Running], tmp_path: Path) -> None:
    settings = {
        "ZIMAGE_REWRITER_USE_API": "true",
        "ZIMAGE_REWRITER_API_URL": f"http://127.0.0.1:{free_port()}",
        "ZIMAGE_REWRITER_API_KEY": "a-secret-key",
    }
    with node(tmp_path, **settings) as rewriter, gateway(tmp_path, rewriter, nodes["encoder"]) as started:
        with started.client() as client:
            for headers in ({}, EVENTS):
                answer = client.post("/api/rewrite", json=BODY, headers=headers)
                assert (answer.status_code, answer.json()["code"]) == (503, "unreachable")
                assert "secret" not in answer.text
        assert "secret" not in rewriter.output + started.output
