"""`/v1/chat/completions` of the encoder: OpenAI's form, on the weights that encode, beside encodes."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from typing import Any

import httpx2
import pytest
import structlog
import torch
from inprocess import client_of
from language import generate, prompt_ids

from services.encoder.app import create_app
from services.encoder.model import TextEncoder
from services.encoder.settings import EncoderSettings
from shared.problems import MEDIA_TYPE as PROBLEM

URL = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "A cat"}]
BODY = {"messages": MESSAGES, "max_tokens": 20, "temperature": 0}


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def app(text_encoder: TextEncoder) -> Any:
    return create_app(EncoderSettings(encoder_max_cache_tokens=2_048), model=text_encoder)


@pytest.fixture
async def client(app: Any, text_encoder: TextEncoder) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(app) as client:
        yield client
    text_encoder.language.batch.clear()


async def ask(client: httpx2.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(URL, json={**BODY, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def text_of(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


async def test_the_answer_has_openais_form(client: httpx2.AsyncClient, text_encoder: TextEncoder) -> None:
    answer = await ask(client, model="whatever")
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", text_encoder.facts.name)
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(prompt_ids(text_encoder.language, "A cat"))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_greedy_text_is_what_generate_writes(client: httpx2.AsyncClient, text_encoder: TextEncoder) -> None:
    language = text_encoder.language
    tokens = generate(language, prompt_ids(language, "A cat"), 20)
    text = language._tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
    assert text_of(await ask(client)) == text


async def test_the_stream_is_the_answer_in_pieces(client: httpx2.AsyncClient) -> None:
    fields = {"temperature": 1.0, "seed": 7}
    whole = await ask(client, **fields)
    answer = await client.post(URL, json={**BODY, **fields, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert data[-1] == "[DONE]"
    *chunks, last, usage = map(json.loads, data[:-1])
    assert {chunk["object"] for chunk in (*chunks, last, usage)} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in (*chunks, last, usage)}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert len(deltas) > 3
    assert [delta.get("role") for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert "".join(delta["content"] for delta in deltas) == text_of(whole)
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert all("usage" not in chunk for chunk in (*chunks, last))


async def test_the_usage_of_a_stream_only_on_request(client: httpx2.AsyncClient) -> None:
    answer = await client.post(URL, json={**BODY, "stream": True})
    assert "usage" not in answer.text


async def test_stop_strings(client: httpx2.AsyncClient) -> None:
    fields = {"temperature": 1.0, "seed": 7, "max_tokens": 40}
    text = text_of(await ask(client, **fields))
    for stop in (text[8:10], [text[8:10], "never"]):
        answer = await ask(client, **fields, stop=stop)
        assert text_of(answer) == text[: text.index(text[8:10])]
        assert answer["choices"][0]["finish_reason"] == "stop"


async def test_max_tokens_under_both_names(client: httpx2.AsyncClient) -> None:
    for fields in ({"max_tokens": 3}, {"max_tokens": None, "max_completion_tokens": 3}):
        answer = await ask(client, **fields)
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["choices"][0]["finish_reason"] == "length"


async def test_without_max_tokens_it_ends_where_there_is_no_room(client: httpx2.AsyncClient) -> None:
    answer = await ask(client, max_tokens=None, messages=[{"role": "user", "content": "cat " * 900}])
    assert answer["usage"]["total_tokens"] <= 2_048


async def test_conversations(client: httpx2.AsyncClient, text_encoder: TextEncoder) -> None:
    """Roles, contents in parts, and what clients send back of an answer."""
    parts = [{"type": "text", "text": "A "}, {"type": "text", "text": "cat"}]
    assert text_of(await ask(client, messages=[{"role": "user", "content": parts}])) == text_of(await ask(client))
    turn = {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": None, "annotations": []}
    conversation = [{"role": "developer", "content": "Be brief."}, *MESSAGES, turn, *MESSAGES]
    counted = (await ask(client, messages=conversation))["usage"]["prompt_tokens"]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA cat<|im_end|>\n<|im_start|>assistant\nYes."
    text += "<|im_end|>\n<|im_start|>user\nA cat<|im_end|>\n<|im_start|>assistant\n"
    assert counted == len(text_encoder.tokenize([text])[0])


async def test_thinking_can_be_switched_off(client: httpx2.AsyncClient) -> None:
    plain = (await ask(client))["usage"]["prompt_tokens"]
    off = (await ask(client, chat_template_kwargs={"enable_thinking": False}))["usage"]["prompt_tokens"]
    on = (await ask(client, chat_template_kwargs={"enable_thinking": True}))["usage"]["prompt_tokens"]
    assert plain == on < off


async def test_fields_that_clients_send_and_that_change_nothing(client: httpx2.AsyncClient) -> None:
    neutral = {
        "n": 1,
        "user": "me",
        "logprobs": False,
        "response_format": {"type": "text"},
        "stop": None,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "top_p": 1,
        "stream": False,
        "stream_options": None,
    }
    assert text_of(await ask(client, **neutral)) == text_of(await ask(client))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "'messages'"),
    "too many": ({"messages": MESSAGES * 129}, "'messages'"),
    "another role": ({"messages": [{"role": "tool", "content": "a"}]}, "'messages'"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "'messages'"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "'messages'"),
    "NUL": ({"messages": [{"role": "user", "content": "a\0"}]}, "'messages'"),
    "too long": ({"messages": [{"role": "user", "content": "x" * 32_001}]}, "'messages'"),
    "more than fits": ({"messages": [{"role": "user", "content": "cat " * 3_000}]}, "at most 2048"),
    "temperature": ({"temperature": -1}, "'temperature'"),
    "top_p": ({"top_p": 2}, "'top_p'"),
    "no tokens": ({"max_tokens": 0}, "'max_tokens'"),
    "many tokens": ({"max_tokens": 10**9}, "'max_tokens'"),
    "seed": ({"seed": 2**63}, "'seed'"),
    "stop": ({"stop": ["a"] * 5}, "'stop'"),
    "an empty stop": ({"stop": [""]}, "'stop'"),
    "a number as stop": ({"stop": 5}, "'stop'"),
    "two answers": ({"n": 2}, "'n'"),
    "logprobs": ({"logprobs": True}, "'logprobs'"),
    "JSON": ({"response_format": {"type": "json_object"}}, "'response_format'"),
    "tools": ({"tools": []}, "'tools'"),
    "penalty": ({"frequency_penalty": 3}, "'frequency_penalty'"),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("fields", "text"), REFUSED.values(), ids=REFUSED.keys())
async def test_refusals_are_problems_that_openais_clients_read(
    client: httpx2.AsyncClient, fields: dict[str, Any], text: str, *, stream: bool
) -> None:
    answer = await client.post(URL, json={**BODY, **fields, "stream": stream})
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
    problem = answer.json()
    assert text.rstrip("'") in problem["detail"]
    assert problem["error"] == {
        "message": problem["detail"],
        "type": problem["title"],
        "param": None,
        "code": "invalid_field",
    }
    assert (await client.post(URL, json={**BODY, "max_tokens": 1})).status_code == 200


async def test_other_endpoints_have_no_such_member(client: httpx2.AsyncClient) -> None:
    assert "error" not in (await client.post("/v1/hidden_states", json={})).json()


async def test_an_error_within_a_stream(client: httpx2.AsyncClient, text_encoder: TextEncoder) -> None:
    batch: Any = text_encoder.language.batch
    advance, works = batch.advance, []

    def break_down() -> Any:
        works.append(1)
        if len(works) > 4:
            raise RuntimeError("a library's own text")
        return advance()

    batch.advance = break_down
    try:
        answer = await client.post(URL, json={**BODY, "temperature": 1.0, "seed": 7, "stream": True})
    finally:
        del batch.advance
    assert answer.status_code == 200
    last = answer.text.strip().rpartition("\n\n")[2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "library" not in answer.text


async def test_encodes_and_tokens_take_turns(client: httpx2.AsyncClient, text_encoder: TextEncoder) -> None:
    """Between two forwards that encode every text gets a token, and between two tokens waiting texts are encoded."""
    work: list[str] = []
    batch: Any = text_encoder.language.batch
    advance, hidden_states = batch.advance, text_encoder.hidden_states

    def advanced() -> Any:
        work.append("token")
        return advance()

    def encoded(*arguments: Any) -> Any:
        work.append("encode")
        return hidden_states(*arguments)

    batch.advance, text_encoder.hidden_states = advanced, encoded  # type: ignore[method-assign]
    try:
        chat = asyncio.create_task(ask(client, max_tokens=150, temperature=1.0, seed=7))
        bodies = [{"input": "cat " * count, "layer": layer} for count in (1, 40, 150) for layer in (-1, -2, -3, -4)]
        encodes = [asyncio.create_task(client.post("/v1/hidden_states", json=body)) for body in bodies]
        answers = await asyncio.gather(chat, *encodes)
    finally:
        del batch.advance
        del text_encoder.hidden_states  # type: ignore[method-assign]
    assert all(answer.status_code == 200 for answer in answers[1:])
    first, last = work.index("encode"), len(work) - work[::-1].index("encode")
    beside = work[first:last]
    assert beside.count("encode") >= 3
    assert ("encode", "encode") not in set(pairwise(beside)), "a text that is being written waits for one batch at most"
    assert text_of(answers[0]) == text_of(await ask(client, max_tokens=150, temperature=1.0, seed=7))


async def test_writing_does_not_change_what_is_encoded(client: httpx2.AsyncClient, text_encoder: TextEncoder) -> None:
    before = text_encoder.hidden_states(text_encoder.tokenize(["A cat"]), -2)[0]
    await ask(client)
    answer = (await client.post("/v1/hidden_states", json={"input": "A cat"})).json()
    assert torch.equal(torch.tensor(answer["hidden_states"]), before)


async def test_a_checkpoint_without_a_head(text_encoder: TextEncoder, headless: Any) -> None:
    async with client_of(headless) as client:
        answer = await client.post(URL, json=BODY)
        assert (answer.status_code, answer.json()["code"]) == (503, "unready")
        assert "no language model head" in answer.json()["detail"]
        assert (await client.post("/v1/hidden_states", json={"input": "A cat"})).status_code == 200


@pytest.fixture
def headless(text_encoder: TextEncoder) -> Any:
    model = TextEncoder(text_encoder._model, text_encoder._tokenizer, text_encoder.facts)
    return create_app(EncoderSettings(), model=model)


async def test_what_is_written_and_waits_are_metrics(client: httpx2.AsyncClient) -> None:
    text = (await client.get("/metrics")).text
    assert 'zimage_encoder_writing{service="encoder"} 0.0' in text
    assert 'zimage_encoder_waiting_chats{service="encoder"} 0.0' in text
