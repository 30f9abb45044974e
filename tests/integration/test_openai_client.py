"""The official `openai` client, unchanged, talks to an encoder node."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from servers import Running

pytestmark = pytest.mark.slow
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A cat"}]


@pytest.fixture
def client(nodes: dict[str, Running]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{nodes['encoder'].url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "any", "messages": MESSAGES, "max_tokens": 24, **fields})


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id


def test_plain(client: openai.OpenAI) -> None:
    answer = complete(client, temperature=0)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert complete(client, temperature=0).choices[0].message.content == choice.message.content


def test_streaming(client: openai.OpenAI) -> None:
    whole = complete(client, seed=7)
    chunks = list(complete(client, seed=7, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 5
    assert chunks[-1].usage == whole.usage
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}


def test_the_helper_for_streams(client: openai.OpenAI) -> None:
    plain = complete(client, seed=7, stop=["e"]).choices[0]
    with client.chat.completions.stream(model="any", messages=MESSAGES, max_tokens=24, seed=7, stop=["e"]) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert plain.finish_reason == "stop"
    assert text == plain.message.content


def test_stop_and_max_tokens(client: openai.OpenAI) -> None:
    text = complete(client, seed=7).choices[0].message.content
    stopped = complete(client, seed=7, stop=text[6:8]).choices[0]
    assert stopped.message.content == text[: text.index(text[6:8])]
    assert stopped.finish_reason == "stop"
    for name in ("max_tokens", "max_completion_tokens"):
        cut = complete(client, seed=7, **{"max_tokens": openai.omit, name: 3})
        assert (cut.usage.completion_tokens, cut.choices[0].finish_reason) == (3, "length")


def test_options_beyond_openais(client: openai.OpenAI) -> None:
    more = {"top_k": 1, "min_p": 0.1, "chat_template_kwargs": {"enable_thinking": False}}
    first, again = (complete(client, extra_body=more).choices[0].message.content for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("fields", "error", "name"),
    [
        ({"temperature": 9}, openai.UnprocessableEntityError, "temperature"),
        ({"max_tokens": 0}, openai.UnprocessableEntityError, "max_tokens"),
        ({"messages": []}, openai.UnprocessableEntityError, "messages"),
        ({"n": 2}, openai.UnprocessableEntityError, "'n'"),
        (
            {"messages": [{"role": "user", "content": "cat " * 8_000}], "max_tokens": 32_768},
            openai.APIStatusError,
            "max_tokens",
        ),
    ],
)
def test_errors(client: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], name: str) -> None:
    for stream in (False, True):
        with pytest.raises(error) as failed:
            complete(client, stream=stream, **fields)
        assert failed.value.status_code == 422
        assert failed.value.code == "invalid_field"
        assert name in failed.value.message
        assert failed.value.request_id
    assert complete(client, max_tokens=1).choices


async def test_the_asynchronous_client(nodes: dict[str, Running]) -> None:
    async with openai.AsyncOpenAI(base_url=f"{nodes['encoder'].url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=8, seed=7, stream=True)
        pieces = [chunk.choices[0].delta.content async for chunk in stream]
    assert "".join(pieces)
