"""`/api/rewrite`: by template and by system prompt, in one answer and as events, with and without a rewriter."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx2
import pytest
import structlog
from inprocess import node_of, started, until
from language import load_language_model

from services.gateway.app import MAX_BODY_WITH_PICTURES_BYTES
from services.gateway.rewriting import RewriterClient
from services.gateway.routes.generate import MAX_PROMPT_BYTES, in_header
from services.rewriter import app as rewriter_app
from services.rewriter import local, model  # noqa: F401 - an app that writes by itself imports them, which blocks
from services.rewriter.settings import RewriterSettings
from shared.client import ServiceClient
from shared.language.model import LanguageModel
from shared.problems import MEDIA_TYPE as PROBLEM
from shared.templates import DEFAULT_DIR, Templates, load_templates

URL = "/api/rewrite"
EVENTS = {"accept": "text/event-stream"}
BODY = {"prompt": "A cat", "custom_system_prompt": "Expand.", "max_tokens": 16, "seed": 8}
Start = Callable[..., AbstractAsyncContextManager[Any]]


@pytest.fixture(scope="module")
def language(tiny_checkpoint: Path) -> LanguageModel:
    return load_language_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def templates() -> Templates:
    return load_templates(DEFAULT_DIR)


class Instead(httpx2.AsyncBaseTransport):
    """Passes calls on, keeping bodies; `answer` answers in the service's place."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self.inner = inner
        self.bodies: list[dict[str, Any]] = []
        self.answer: Callable[[], httpx2.Response] | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """One call."""
        if request.url.path == "/v1/rewrite":
            self.bodies.append(json.loads(await request.aread()))
            if self.answer is not None:
                return self.answer()
        return await self.inner.handle_async_request(request)


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def start(start_gateway: Start, language: LanguageModel) -> Start:
    """A gateway before a rewriter that writes with the tiny language model."""

    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[tuple[Any, Instead]]:
        app = await asyncio.to_thread(rewriter_app.create_app, RewriterSettings(), model=language)
        async with started(app) as writing:
            transport = Instead(httpx2.ASGITransport(writing))
            service = ServiceClient("rewriter", "http://rewriter", max_reply_bytes=1 << 20, transport=transport)
            async with start_gateway(rewriter=RewriterClient(node_of(service)), **settings) as gateway:
                yield gateway, transport
        language.batch.clear()

    return start


@pytest.fixture
async def rewriting(start: Start) -> AsyncIterator[tuple[Any, Instead]]:
    async with start() as started:
        yield started


@pytest.fixture
def client(rewriting: tuple[Any, Instead]) -> httpx2.AsyncClient:
    gateway: httpx2.AsyncClient = rewriting[0].client
    return gateway


@pytest.fixture
def rewriter(rewriting: tuple[Any, Instead]) -> Instead:
    return rewriting[1]


async def test_by_a_system_prompt(client: httpx2.AsyncClient, rewriter: Instead) -> None:
    answer = await client.post(URL, json=BODY)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert {name: body[name] for name in ("original_prompt", "rewriter", "backend", "seed")} == {
        "original_prompt": "A cat",
        "rewriter": None,
        "backend": "local",
        "seed": 8,
    }
    assert body["rewritten_prompt"]
    assert body["thinking_content"] is None
    assert body["gen_time"] > 0
    (sent,) = rewriter.bodies
    assert (sent["prompt"], sent["system_prompt"], sent["max_tokens"]) == ("A cat", "Expand.", 16)
    assert sent["temperature"] is None, "the rewriter has the defaults"


async def test_by_every_template(client: httpx2.AsyncClient, rewriter: Instead, templates: Templates) -> None:
    assert len(templates.rewriters) >= 8
    for name, template in templates.rewriters.items():
        answer = await client.post(URL, json={"prompt": "A cat", "rewriter": name, "max_tokens": 1})
        assert answer.status_code == 200, answer.text
        assert answer.json()["rewriter"] == name
        assert rewriter.bodies[-1]["system_prompt"] == template.system_prompt


async def test_an_explicit_system_prompt_wins_over_the_template(client: httpx2.AsyncClient, rewriter: Instead) -> None:
    answer = await client.post(URL, json={**BODY, "rewriter": "rewriter_general"})
    assert answer.json()["rewriter"] == "rewriter_general"
    assert rewriter.bodies[-1]["system_prompt"] == "Expand."


async def test_all_options_are_passed_on(client: httpx2.AsyncClient, rewriter: Instead) -> None:
    options = {
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.5,
        "min_p": 0.1,
        "top_k": 7,
        "presence_penalty": 1.0,
        "seed": 2**63 - 1,
        "enable_thinking": False,
    }
    assert (await client.post(URL, json={**BODY, **options})).status_code == 200
    assert rewriter.bodies[-1] == {"prompt": "A cat", "system_prompt": "Expand.", **options}


def events(text: str) -> list[tuple[str, Any]]:
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.strip().split("\n\n")]
    return [(block["event"], json.loads(block["data"])) for block in blocks]


async def test_events(client: httpx2.AsyncClient) -> None:
    whole = (await client.post(URL, json=BODY)).json()
    answer = await client.post(URL, json=BODY, headers=EVENTS)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *pieces, (last, done) = events(answer.text)
    assert last == "done"
    assert {**done, "gen_time": 0} == {**whole, "gen_time": 0}
    assert "".join(data["text"] for name, data in pieces if name == "text") == whole["rewritten_prompt"]
    assert len(pieces) > 2


THINKS = b'event: thinking\ndata: {"text":"Fur."}\n\nevent: text\ndata: {"text":"A fluffy cat."}\n\n'
FAILS = (
    b'event: error\ndata: {"title":"t","status":500,"detail":"Ours.","code":"numerical_error","request_id":null}\n\n'
)


class Body(httpx2.AsyncByteStream):
    def __init__(self, content: bytes) -> None:
        self.content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.content


def answers(content: bytes, kind: str = "text/event-stream", status: int = 200) -> Callable[[], httpx2.Response]:
    return lambda: httpx2.Response(status, headers={"content-type": kind}, stream=Body(content))


async def test_thinking_and_an_error_pass_through(client: httpx2.AsyncClient, rewriter: Instead) -> None:
    rewriter.answer = answers(THINKS + FAILS)
    answer = await client.post(URL, json=BODY, headers=EVENTS)
    thinking, text, error = events(answer.text)
    assert (thinking, text) == (("thinking", {"text": "Fur."}), ("text", {"text": "A fluffy cat."}))
    assert error[0] == "error"
    assert (error[1]["code"], error[1]["detail"]) == ("numerical_error", "Ours.")
    assert error[1]["request_id"] == answer.headers["x-request-id"]


async def test_a_text_that_breaks_off_is_an_error(client: httpx2.AsyncClient, rewriter: Instead) -> None:
    rewriter.answer = answers(THINKS)
    answer = await client.post(URL, json=BODY, headers=EVENTS)
    *_, (name, data) = events(answer.text)
    assert (name, data["code"]) == ("error", "bad_upstream")


@pytest.mark.slow
@pytest.mark.parametrize("headers", [{}, EVENTS], ids=["JSON", "events"])
async def test_a_rewriter_that_answers_nonsense(
    client: httpx2.AsyncClient, rewriter: Instead, headers: dict[str, str]
) -> None:
    for answer in (answers(b"{}", "application/json"), answers(b"event: done\ndata: {}\n\n")):
        rewriter.answer = answer
        refused = await client.post(URL, json=BODY, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (502, "bad_upstream")


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "neither": ({"custom_system_prompt": None}, 422, "'rewriter' or 'custom_system_prompt'"),
    "a blank system prompt": ({"custom_system_prompt": " "}, 422, "'custom_system_prompt'"),
    "an unknown rewriter": ({"rewriter": "no_such"}, 404, "GET /api/rewriters"),
    "a template for pictures": ({"rewriter": "default"}, 404, "GET /api/rewriters"),
    "a path": ({"rewriter": "../../etc/passwd"}, 404, "GET /api/rewriters"),
    "NUL in a name": ({"rewriter": "a\0"}, 422, "'rewriter'"),
    "no prompt": ({"prompt": None}, 422, "'prompt'"),
    "a blank prompt": ({"prompt": ""}, 422, "'prompt'"),
    "a long prompt": ({"prompt": "x" * 32_001}, 422, "'prompt'"),
    "temperature": ({"temperature": -1}, 422, "'temperature'"),
    "top_p": ({"top_p": 2}, 422, "'top_p'"),
    "min_p": ({"min_p": -0.1}, 422, "'min_p'"),
    "top_k": ({"top_k": -1}, 422, "'top_k'"),
    "no tokens": ({"max_tokens": 0}, 422, "'max_tokens'"),
    "many tokens": ({"max_tokens": 10**9}, 422, "'max_tokens'"),
    "seed": ({"seed": 2**63}, 422, "'seed'"),
    "unknown": ({"system_prompt": "a"}, 422, "'system_prompt'"),
}


@pytest.mark.parametrize("headers", [{}, EVENTS], ids=["JSON", "events"])
@pytest.mark.parametrize(("fields", "status", "text"), REFUSED.values(), ids=REFUSED.keys())
async def test_refusals(
    client: httpx2.AsyncClient, fields: dict[str, Any], status: int, text: str, headers: dict[str, str]
) -> None:
    answer = await client.post(URL, json={**BODY, **fields}, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    assert text in answer.json()["detail"]
    assert (await client.post(URL, json={**BODY, "max_tokens": 1})).status_code == 200


async def test_bodies_that_cannot_be_read(client: httpx2.AsyncClient) -> None:
    for content, kind, status in (
        (b"{", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"[" * 100_000, "application/json", 400),
        (b" " * (MAX_BODY_WITH_PICTURES_BYTES + 1), "application/json", 413),
    ):
        answer = await client.post(URL, content=content, headers={"content-type": kind})
        assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)


@pytest.mark.parametrize("headers", [{}, EVENTS], ids=["JSON", "events"])
async def test_a_server_without_a_rewriter(gateway: Any, headers: dict[str, str]) -> None:
    answer = await gateway.client.post(URL, json=BODY, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (503, "unready")
    assert "--rewriter-use-api" in answer.json()["detail"]
    health = (await gateway.client.get("/health")).json()
    assert (health["status"], health["services"]["rewriter"]["status"]) == ("healthy", "not_configured")


async def test_the_deadline(start: Start) -> None:
    async with start(rewrite_timeout_s=0.001) as (gateway, _):
        for headers in ({}, EVENTS):
            answer = await gateway.client.post(URL, json=BODY, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (504, "upstream_timeout")


def refuse_connection(_: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("a library's own text")


@pytest.mark.slow
async def test_a_rewriter_that_goes_away_leaves_the_gateway_ready(
    client: httpx2.AsyncClient, rewriter: Instead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.node.INTERVAL_S", 0.01)
    await until(client, "/health", lambda answer: answer.json()["status"] == "healthy")
    inner, rewriter.inner = rewriter.inner, httpx2.MockTransport(refuse_connection)
    await until(client, "/health", lambda answer: answer.json()["status"] == "degraded")
    assert (await client.get("/health")).json()["services"]["rewriter"]["status"] == "unreachable"
    assert (await client.get("/health/ready")).status_code == 200
    for headers in ({}, EVENTS):
        answer = await client.post(URL, json=BODY, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (503, "unreachable")
        assert "library" not in answer.text
    rewriter.inner = inner
    await until(client, "/health", lambda answer: answer.json()["status"] == "healthy")


SMALL = {"prompt": "A cat", "width": 64, "height": 64, "steps": 2, "seed": 1}
REWRITE = {key: value for key, value in BODY.items() if key != "prompt"}


def written(text: str, thinking: str | None = None) -> Callable[[], httpx2.Response]:
    answer = {"rewritten_prompt": text, "thinking_content": thinking, "backend": "local", "finish_reason": "stop"}
    return answers(json.dumps({**answer, "seed": 1}).encode(), "application/json")


def parameters_of(png: bytes) -> dict[str, Any]:
    """The text chunk of a PNG."""
    found = png[png.index(b"tEXtzimage\0") + 11 :]
    fields: dict[str, Any] = json.JSONDecoder().raw_decode(found.decode("latin-1"))[0]
    return fields


async def test_a_picture_of_the_rewritten_prompt(
    client: httpx2.AsyncClient, rewriter: Instead, rewriting: tuple[Any, Instead]
) -> None:
    """The same picture as when the client does both one after the other."""
    rewriter.answer = written("A fluffy ünïcode cat, 两只", "Fur.")
    answer = await client.post("/api/generate", json={**SMALL, "rewrite": REWRITE})
    assert answer.status_code == 200, answer.text
    assert (rewriter.bodies[-1]["prompt"], rewriter.bodies[-1]["system_prompt"]) == ("A cat", "Expand.")
    assert unquote(answer.headers["x-prompt"]) == "A fluffy ünïcode cat, 两只"
    assert unquote(answer.headers["x-original-prompt"]) == "A cat"
    assert answer.headers["server-timing"].startswith("rewrite;dur=")
    encoded = json.loads(rewriting[0].encoder.calls[-1][0].content)["input"]
    assert encoded == [
        "<|im_start|>user\nA fluffy ünïcode cat, 两只<|im_end|>\n<|im_start|>assistant\n<think>\nFur.\n</think>\n"
    ]
    fields = parameters_of(answer.content)
    assert fields["prompt"] == "A fluffy ünïcode cat, 两只"
    again = await client.post("/api/generate", json=fields)
    assert again.content == answer.content, "the PNG's own parameters make it again, without a rewriter"
    assert len(rewriter.bodies) == 1
    assert "x-prompt" not in again.headers


async def test_thinking_that_the_request_gives_itself_stays(client: httpx2.AsyncClient, rewriter: Instead) -> None:
    rewriter.answer = written("A fluffy cat.", "Fur.")
    for given, used in ((None, "Fur."), ("Mine.", "Mine."), ("", "")):
        body = {**SMALL, "thinking_content": given, "rewrite": REWRITE}
        answer = await client.post("/api/generate", json=body)
        assert parameters_of(answer.content)["thinking_content"] == used


async def test_a_stream_tells_the_rewritten_prompt(client: httpx2.AsyncClient, rewriter: Instead) -> None:
    rewriter.answer = written("A fluffy cat.")
    answer = await client.post("/api/generate", json={**SMALL, "rewrite": REWRITE}, headers=EVENTS)
    followed = events(answer.text)
    assert followed[0][0] == "rewritten"
    assert (followed[0][1]["rewritten_prompt"], followed[0][1]["original_prompt"]) == ("A fluffy cat.", "A cat")
    assert followed[-1][0] == "done"
    assert unquote(followed[-1][1]["headers"]["X-Prompt"]) == "A fluffy cat."


@pytest.mark.parametrize("thinking", [None, "Fur."])
async def test_a_rewriter_that_only_thinks_leaves_the_prompt_as_it_is(
    client: httpx2.AsyncClient, rewriter: Instead, thinking: str | None
) -> None:
    rewriter.answer = written("", thinking)
    answer = await client.post("/api/generate", json={**SMALL, "rewrite": REWRITE})
    assert answer.status_code == 200
    fields = parameters_of(answer.content)
    assert (fields["prompt"], fields["thinking_content"]) == ("A cat", thinking)
    assert answer.headers["x-prompt"] == answer.headers["x-original-prompt"] == "A%20cat"


@pytest.mark.parametrize(("text", "thinking"), [("x" * 32_001, None), ("A cat", "x" * 32_001)])
async def test_a_text_that_is_too_long_for_a_prompt(
    client: httpx2.AsyncClient, rewriter: Instead, text: str, thinking: str | None
) -> None:
    rewriter.answer = written(text, thinking)
    answer = await client.post("/api/generate", json={**SMALL, "rewrite": REWRITE})
    assert (answer.status_code, answer.json()["code"]) == (502, "bad_upstream")
    assert "32000 characters" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"rewrite": {}}, 422),
        ({"rewrite": {"rewriter": "no_such"}}, 404),
        ({"rewrite": {**REWRITE, "temperature": -1}}, 422),
        ({"rewrite": {**REWRITE, "prompt": "A dog"}}, 422),
        ({"rewrite": "rewriter_general"}, 422),
        ({"rewrite": REWRITE, "width": 100}, 422),
        ({"rewrite": REWRITE, "width": 8_192, "height": 8_192}, 422),
        ({"rewrite": REWRITE, "template": "no_such"}, 404),
    ],
)
async def test_bad_requests_cost_nothing(
    client: httpx2.AsyncClient, rewriter: Instead, fields: dict[str, Any], status: int
) -> None:
    answer = await client.post("/api/generate", json={**SMALL, **fields})
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    assert rewriter.bodies == []


async def test_a_server_without_a_rewriter_draws_what_is_not_to_be_rewritten(gateway: Any) -> None:
    assert (await gateway.generate(rewrite=REWRITE)).status_code == 503
    assert (await gateway.generate(rewrite=None)).status_code == 200


@pytest.mark.parametrize("char", ["a", " ", "ü", "两", "🐈"])
@pytest.mark.parametrize("count", [1, 80, 111, 500, 32_000])
def test_prompts_in_headers(char: str, count: int) -> None:
    text = in_header(char * count)
    assert len(text) <= MAX_PROMPT_BYTES
    assert text.isascii()
    decoded = unquote(text, errors="strict")
    assert decoded == char * count or (decoded[-1] == "…" and set(decoded[:-1]) == {char})
