"""`/v1/describe`: both forms of the answer, the settings' defaults, and thinking told apart as the rewriter does."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from inprocess import client_of
from pictures import encoded
from transformers import AutoTokenizer

from services.vl.app import create_app
from services.vl.model import Inputs, VisionModel
from services.vl.settings import VlSettings
from shared.language.options import Sampling
from shared.problems import MEDIA_TYPE as PROBLEM
from shared.wire import MEDIA_TYPE, TensorMeta, build_header

PICTURE = encoded()
URL, HEADERS = "/v1/describe", {"content-type": MEDIA_TYPE}
EVENTS = {**HEADERS, "accept": "text/event-stream"}
WANTED = {"prompt": "What is it?", "max_tokens": 12, "seed": 5}


class Scripted(VisionModel):
    """The model, which writes a given text and notes what it was asked."""

    def __init__(self, inner: VisionModel, tokens: Sequence[int] = ()) -> None:
        self.__dict__.update(inner.__dict__)
        self.tokens = tokens
        self.asked: list[tuple[list[int], Sampling]] = []

    def write(self, inputs: Inputs, sampling: Sampling) -> Iterator[int]:
        self.asked.append((list(inputs.ids), sampling))
        return iter(self.tokens) if self.tokens else super().write(inputs, sampling)


async def app_of(model: VisionModel, **settings: Any) -> Any:
    return await asyncio.to_thread(create_app, VlSettings(**settings), model=model)


@pytest.fixture
async def client(vision_model: VisionModel) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(await app_of(vision_model)) as client:
        yield client


def message(picture: bytes = PICTURE, **fields: Any) -> bytes:
    header = build_header(
        [TensorMeta("image", "U8", (len(picture),))], {"parameters": json.dumps({**WANTED, **fields})}
    )
    return header + picture


def events(text: str) -> list[tuple[str, Any]]:
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.strip().split("\n\n")]
    return [(block["event"], json.loads(block["data"])) for block in blocks]


def joined(followed: Sequence[tuple[str, Any]], name: str) -> str:
    return "".join(data["text"] for event, data in followed if event == name)


async def test_events(client: httpx2.AsyncClient) -> None:
    whole = await client.post(URL, content=message(), headers=HEADERS)
    answer = await client.post(URL, content=message(), headers=EVENTS)
    assert answer.headers["content-type"].startswith("text/event-stream")
    followed = events(answer.text)
    assert followed[-1] == ("done", whole.json())
    assert joined(followed, "text") == whole.json()["rewritten_prompt"]
    assert len(followed) > 3
    assert (whole.json()["seed"], whole.json()["backend"]) == (5, "local")


@pytest.mark.parametrize("headers", [HEADERS, EVENTS], ids=["JSON", "events"])
async def test_refusals_come_before_the_first_event(client: httpx2.AsyncClient, headers: dict[str, str]) -> None:
    for body, status in ((message(b"GIF89a"), 422), (message(temperature=3), 422), (message(encoded()[:-40]), 422)):
        answer = await client.post(URL, content=body, headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    assert (await client.post(URL, content=message(max_tokens=1), headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("written", "thinking", "text"),
    [
        ("<think>\nFur.\n</think>\n\nA cat.", "Fur.", "A cat."),
        ("A cat.", None, "A cat."),
        ("Fur.</think>A cat.", "Fur.", "A cat."),
        ("<think>Fur", "Fur", ""),
        ('{"say": "</think>"}', None, '{"say": "</think>"}'),
    ],
)
async def test_thinking_is_told_apart(
    vision_model: VisionModel, tiny_vision_checkpoint: Path, written: str, thinking: str | None, text: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_vision_checkpoint)
    tokens = [*tokenizer(written, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    async with client_of(await app_of(Scripted(vision_model, tokens))) as client:
        body = message(max_tokens=99)
        whole = (await client.post(URL, content=body, headers=HEADERS)).json()
        assert (whole["thinking_content"], whole["rewritten_prompt"]) == (thinking, text)
        assert whole["finish_reason"] == "stop"
        followed = events((await client.post(URL, content=body, headers=EVENTS)).text)
        assert followed[-1] == ("done", whole)
        if "<think>" in written:
            assert joined(followed, "thinking") == thinking
            assert joined(followed, "text") == text


async def test_an_opened_think_block_is_thinking_from_the_start(
    vision_model: VisionModel, tiny_vision_checkpoint: Path
) -> None:
    """As the template of a checkpoint that always thinks has it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_vision_checkpoint)
    model = Scripted(vision_model, tokenizer("Fur.</think>A cat.", add_special_tokens=False).input_ids)
    facts = {name: getattr(model.facts, name) for name in model.facts.__slots__}
    model.facts = type(model.facts)(**{**facts, "openings": dict.fromkeys((None, True, False), "<think>\n")})
    async with client_of(await app_of(model)) as client:
        followed = events((await client.post(URL, content=message(max_tokens=len(model.tokens)), headers=EVENTS)).text)
    assert (joined(followed, "thinking"), joined(followed, "text")) == ("Fur.", "A cat.")


async def test_options_and_defaults(vision_model: VisionModel, tiny_vision_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_vision_checkpoint)
    shut = tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False).input_ids
    defaults = {
        "rewriter_temperature": 0.5,
        "rewriter_top_p": 0.6,
        "rewriter_min_p": 0.1,
        "rewriter_top_k": 7,
        "rewriter_presence_penalty": 1.0,
        "rewriter_max_tokens": 3,
        "rewriter_enable_thinking": False,
    }
    model = Scripted(vision_model)
    async with client_of(await app_of(model, **defaults)) as client:

        async def asked(**fields: Any) -> tuple[list[int], Sampling]:
            answer = await client.post(URL, content=message(**fields), headers=HEADERS)
            assert answer.status_code == 200, answer.text
            return model.asked[-1]

        ids, sampling = await asked(max_tokens=None)
        assert ids[-len(shut) :] == shut
        expected = {"temperature": 0.5, "top_p": 0.6, "min_p": 0.1, "top_k": 7, "presence_penalty": 1.0}
        assert sampling == Sampling(seed=5, **expected)
        given = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "presence_penalty": 0.0}
        ids, sampling = await asked(**given, enable_thinking=True, seed=0, max_tokens=1)
        assert ids[-len(shut) :] != shut
        assert sampling == Sampling(seed=0, **given)


async def test_the_settings_bound_a_text_that_names_no_bound(vision_model: VisionModel) -> None:
    async with client_of(await app_of(vision_model, rewriter_max_tokens=3, rewriter_temperature=0.0)) as client:
        short = (await client.post(URL, content=message(max_tokens=None), headers=HEADERS)).json()
        long = (await client.post(URL, content=message(max_tokens=20), headers=HEADERS)).json()
    assert long["rewritten_prompt"].startswith(short["rewritten_prompt"])
    assert len(long["rewritten_prompt"]) > len(short["rewritten_prompt"])
