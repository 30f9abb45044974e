"""`ApiBackEnd` against servers of OpenAI's protocol: what it sends, what it reads, and what it tells of errors."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.rewriter.backend import Writing, Written
from services.rewriter.clients import ApiBackEnd
from shared.client import ServiceClient
from shared.errors import BadUpstream, InvalidField, QueueFull, ServiceError, Unreachable, UpstreamTimeout
from shared.language.options import Message, Sampling

THEIRS = "the other server's own words"
JSON, EVENTS = {"content-type": "application/json"}, {"content-type": "text/event-stream; charset=utf-8"}


class Body(httpx2.AsyncByteStream):
    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


Answer = Callable[[httpx2.Request], httpx2.Response]


def respond(status: int, content: bytes | Sequence[bytes], headers: dict[str, str]) -> Answer:
    pieces = [content] if isinstance(content, bytes) else content
    return lambda _: httpx2.Response(status, headers=headers, stream=Body(pieces))


def completion(**message: Any) -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop", "logprobs": None}
    return respond(200, json.dumps({"id": "x", "choices": [choice], "usage": {}, "more": 1}).encode(), JSON)


def stream(*data: Any, done: bool = True) -> Answer:
    lines = [f"data: {item if isinstance(item, str) else json.dumps(item)}\r\n\r\n".encode() for item in data]
    return respond(200, [b": hello\n\n", *lines, *([b"data: [DONE]\n\n"] if done else [])], EVENTS)


def chunk(reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def back_end(*answers: Answer, name: Literal["local", "api"] = "api") -> ApiBackEnd:
    services = [
        ServiceClient(
            "rewriter API",
            "http://other",
            max_reply_bytes=100_000,
            headers={"authorization": "Bearer the-key"},
            transport=httpx2.MockTransport(answer),
            foreign=name == "api",
        )
        for answer in answers
    ]
    return ApiBackEnd(services, name=name, model="Qwen3-4B", timeout_s=5)


def writing(*, follow: bool = False, seed: int | None = None, **sampling: Any) -> Writing:
    return Writing(
        messages=[Message("system", "Expand."), Message("user", "A cat")],
        sampling=Sampling(seed=seed or 0, **{"top_p": 0.95, **sampling}),
        max_tokens=32,
        seed=seed,
        enable_thinking=None,
        follow=follow,
    )


async def written(end: ApiBackEnd, wanted: Writing) -> list[Written]:
    async with end:
        return [piece async for piece in end.write(wanted)]


async def test_a_completion_in_one_piece() -> None:
    assert await written(back_end(completion(content="A fluffy cat.")), writing()) == [
        Written(text="A fluffy cat.", reason="stop")
    ]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_thinking_that_a_server_tells_apart(name: str) -> None:
    answer = completion(**{"content": "A cat.", name: "Fluffy."})
    assert await written(back_end(answer), writing()) == [Written(text="A cat.", thinking="Fluffy.", reason="stop")]
    events = stream(chunk(**{name: "Flu"}), chunk(**{name: "ffy."}), chunk(content="A cat."), chunk("stop"))
    pieces = await written(back_end(events), writing(follow=True))
    assert "".join(piece.thinking for piece in pieces) == "Fluffy."
    assert "".join(piece.text for piece in pieces) == "A cat."


async def test_a_stream() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}
    empty = {"choices": [{"index": 0, "delta": None, "finish_reason": None}]}
    answer = stream(
        chunk(role="assistant", content=None), empty, chunk(content="A "), chunk("length", content="cat"), usage
    )
    pieces = await written(back_end(answer), writing(follow=True))
    assert "".join(piece.text for piece in pieces) == "A cat"
    assert pieces[-1] == Written(reason="length")


async def test_a_stream_that_ends_without_its_mark() -> None:
    with pytest.raises(BadUpstream, match="before the text was whole"):
        await written(back_end(stream(chunk(content="A cat"), done=False)), writing(follow=True))


async def sent(wanted: Writing) -> tuple[httpx2.Request, dict[str, Any]]:
    requests: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return completion(content="x")(request)

    await written(back_end(answer), wanted)
    return requests[0], json.loads(requests[0].content)


async def test_what_is_sent_by_default_is_what_every_server_knows() -> None:
    request, body = await sent(writing())
    assert request.url == "http://other/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer the-key"
    assert body == {
        "model": "Qwen3-4B",
        "messages": [{"role": "system", "content": "Expand."}, {"role": "user", "content": "A cat"}],
        "max_tokens": 32,
        "temperature": 1.0,
        "top_p": 0.95,
        "stream": False,
    }


async def test_what_is_asked_for_besides_is_sent_too() -> None:
    _, body = await sent(writing(seed=0, min_p=0.1, top_k=5, presence_penalty=-1.0, temperature=0.0))
    assert {name: body[name] for name in ("seed", "min_p", "top_k", "presence_penalty", "temperature")} == {
        "seed": 0,
        "min_p": 0.1,
        "top_k": 5,
        "presence_penalty": -1.0,
        "temperature": 0.0,
    }


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize(
    ("status", "raised"),
    [(400, InvalidField), (401, BadUpstream), (404, BadUpstream), (429, QueueFull), (500, BadUpstream)],
)
async def test_a_refusal_is_told_by_its_status_alone(status: int, raised: type[ServiceError], *, follow: bool) -> None:
    content = json.dumps({"error": {"message": THEIRS}, "detail": THEIRS, "code": "invalid_field"}).encode()
    for kind in ("application/json", "application/problem+json"):
        answer = respond(status, content, {"content-type": kind, "retry-after": "7"})
        with pytest.raises(ServiceError) as failed:
            await written(back_end(answer), writing(follow=follow))
        assert type(failed.value) is raised
        said = "refused it" if status == 400 else "answered"
        assert failed.value.detail == f"The rewriter API service {said} with status {status}."
        assert failed.value.retry_after_s == (7 if status == 429 else None)


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"<html>" + THEIRS.encode(), {"content-type": "text/html"}),
        (b'{"choices": []}', JSON),
        (b'{"choices": [{}]}', JSON),
        (b'{"choices": [{"message": {"content": "\\ud800"}}]}', JSON),
        (b'data: {"choices": 5}\n\n', EVENTS),
        (b"data: " + THEIRS.encode() + b"\n\n", EVENTS),
        (b"data: " + b"x" * 2_000_000 + b"\n\n", EVENTS),
    ],
    ids=["html", "no choice", "no message", "surrogate", "no list", "no JSON", "large"],
)
async def test_answers_that_make_no_sense(content: bytes, headers: dict[str, str], *, follow: bool) -> None:
    with pytest.raises(BadUpstream) as failed:
        await written(back_end(respond(200, content, headers)), writing(follow=follow))
    assert THEIRS not in failed.value.detail


async def test_an_error_within_a_stream() -> None:
    answer = stream(chunk(content="A "), {"error": {"message": THEIRS, "code": "queue_full"}})
    with pytest.raises(BadUpstream, match="broke its answer off") as failed:
        await written(back_end(answer), writing(follow=True))
    assert THEIRS not in failed.value.detail
    with pytest.raises(QueueFull, match="own words"):  # of our encoder the sentence is ours
        await written(back_end(answer, name="local"), writing(follow=True))


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (httpx2.ConnectError("key"), Unreachable),
        (httpx2.ConnectTimeout("key"), Unreachable),
        (httpx2.RemoteProtocolError("key"), Unreachable),
    ],
)
async def test_a_server_that_is_not_there(error: Exception, raised: type[ServiceError], *, follow: bool) -> None:
    def answer(_: httpx2.Request) -> httpx2.Response:
        raise error

    with pytest.raises(raised) as failed:
        await written(back_end(answer), writing(follow=follow))
    assert "key" not in failed.value.detail


def gone(_: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("no one there")


full = respond(429, b'{"code": "queue_full", "detail": "8 texts wait."}', JSON)


@pytest.mark.parametrize("follow", [True, False])
async def test_another_server_writes_where_one_cannot(*, follow: bool) -> None:
    works = stream(chunk(content="A cat."), chunk("stop")) if follow else completion(content="A cat.")
    async with back_end(gone, works, full, name="local") as end:
        for _ in range(3):
            pieces = [piece async for piece in end.write(writing(follow=follow))]
            assert "".join(piece.text for piece in pieces) == "A cat."
    with pytest.raises(QueueFull):
        await written(back_end(full, full, name="local"), writing(follow=follow))


async def test_servers_are_asked_in_turns() -> None:
    async with back_end(*(completion(content=name) for name in "abc")) as end:
        said = [piece.text for _ in range(6) async for piece in end.write(writing())]
    assert sorted(said[:3]) == ["a", "b", "c"]
    assert said[3:] == said[:3]


async def test_no_other_server_goes_on_with_what_one_has_begun() -> None:
    breaks = stream(chunk(content="A "), {"error": {"message": "Full.", "code": "queue_full"}})
    said: list[str] = []
    async with back_end(breaks, breaks, name="local") as end:
        with pytest.raises(QueueFull):
            async for piece in end.write(writing(follow=True)):
                said.append(piece.text)  # noqa: PERF401 - it raises
    assert said == ["A "]


@pytest.mark.parametrize("follow", [True, False])
async def test_a_server_that_is_silent(monkeypatch: pytest.MonkeyPatch, *, follow: bool) -> None:
    class Silent(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b": waiting\n\n" if follow else b" "
            await asyncio.Event().wait()

    end = back_end(lambda _: httpx2.Response(200, headers=EVENTS if follow else JSON, stream=Silent()))
    monkeypatch.setattr(end, "_timeout_s", 0.05)
    with pytest.raises(UpstreamTimeout):
        await written(end, writing(follow=follow))


@given(content=st.binary(max_size=200), follow=st.booleans(), headers=st.sampled_from([JSON, EVENTS]))
def test_whatever_comes_raises_nothing_but_ours(content: bytes, *, follow: bool, headers: dict[str, str]) -> None:
    async def ask() -> None:
        with suppress(ServiceError):
            await written(back_end(respond(200, content, headers)), writing(follow=follow))

    asyncio.run(ask())
