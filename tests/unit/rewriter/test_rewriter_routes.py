"""The rewriter's endpoint on the tiny language model: both forms of the answer, defaults, and every refusal."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from inprocess import client_of, eventually, served, until
from language import PROMPTS, generate
from structlog.testing import capture_logs

from services.rewriter.app import create_app
from services.rewriter.settings import RewriterSettings
from shared.language.model import LanguageModel
from shared.language.options import Message
from shared.problems import MEDIA_TYPE as PROBLEM

URL = "/v1/rewrite"
EVENTS = {"accept": "text/event-stream"}
SYSTEM = "Expand the prompt."
BODY = {"prompt": "A cat", "system_prompt": SYSTEM, "max_tokens": 24, "temperature": 0}


async def app_of(language: LanguageModel | None, **settings: Any) -> Any:
    """The app, made in a thread as it is made outside of any loop."""
    return await asyncio.to_thread(create_app, RewriterSettings(**settings), model=language)


@pytest.fixture
async def client(language: LanguageModel) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(await app_of(language)) as client:
        yield client


def events(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((fields["event"], json.loads(fields["data"])))
    return found


def joined(followed: Sequence[tuple[str, Any]], name: str) -> str:
    return "".join(data["text"] for event, data in followed if event == name)


@pytest.mark.slow
async def test_greedy_text_is_what_generate_writes(client: httpx2.AsyncClient, language: LanguageModel) -> None:
    """Alone, and eight different prompts at once."""
    bodies = [{**BODY, "prompt": prompt} for prompt in PROMPTS]
    alone = [(await client.post(URL, json=body)).json() for body in bodies]
    together = [answer.json() for answer in await asyncio.gather(*(client.post(URL, json=body) for body in bodies))]
    assert together == [{**answer, "seed": again["seed"]} for answer, again in zip(alone, together, strict=True)]
    for prompt, answer in zip(PROMPTS, alone, strict=True):
        ids = language.prompt([Message("system", SYSTEM), Message("user", prompt)]).ids
        tokens = generate(language, ids, 24)
        text = language._tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
        assert "think>" not in text, "choose other prompts: this one tests the parser too"
        assert answer["rewritten_prompt"] == text.replace("\0", "").strip()
        assert answer["backend"] == "local"
        assert answer["finish_reason"] in ("stop", "length")


async def test_events(client: httpx2.AsyncClient) -> None:
    whole = (await client.post(URL, json={**BODY, "seed": 5})).json()
    answer = await client.post(URL, json={**BODY, "seed": 5}, headers=EVENTS)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    followed = events(answer.text)
    assert followed[-1] == ("done", whole)
    assert joined(followed, "text") == whole["rewritten_prompt"]
    assert len(followed) > 3


async def test_a_seed_is_told_and_writes_the_same_again(client: httpx2.AsyncClient) -> None:
    body = {**BODY, "temperature": 1.0}
    first = (await client.post(URL, json=body)).json()
    again = (await client.post(URL, json={**body, "seed": first["seed"]})).json()
    assert again == first
    assert (await client.post(URL, json={**body, "seed": first["seed"] + 1})).json() != first


async def test_thinking_may_be_switched_off(language: LanguageModel) -> None:
    seen: list[Any] = []
    prompt = language.prompt

    def recorded(messages: Any, *, enable_thinking: bool | None = None) -> list[int]:
        seen.append(enable_thinking)
        return prompt(messages, enable_thinking=enable_thinking)

    language.prompt = recorded  # type: ignore[method-assign]
    try:
        for settings in ({}, {"rewriter_enable_thinking": False}):
            async with client_of(await app_of(language, **settings)) as client:
                for value in (None, True, False):
                    await client.post(URL, json={**BODY, "max_tokens": 1, "enable_thinking": value})
    finally:
        del language.prompt  # type: ignore[method-assign]
    assert seen == [None, True, False, False, True, False]


async def test_defaults_come_from_the_settings(language: LanguageModel) -> None:
    settings = {"rewriter_temperature": 0.0, "rewriter_max_tokens": 3}
    async with client_of(await app_of(language, **settings)) as client:
        plain = {"prompt": "A cat", "system_prompt": SYSTEM}
        answers = [(await client.post(URL, json=plain)).json()["rewritten_prompt"] for _ in range(2)]
        longer = (await client.post(URL, json={**plain, "max_tokens": 20})).json()["rewritten_prompt"]
    assert answers[0] == answers[1]
    assert longer.startswith(answers[0])
    assert len(longer) > len(answers[0])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "'prompt'"),
    "a blank prompt": ({"prompt": " \n"}, "'prompt'"),
    "a long prompt": ({"prompt": "x" * 32_001}, "'prompt'"),
    "NUL": ({"prompt": "a\0"}, "'prompt'"),
    "no system prompt": ({"system_prompt": None}, "'system_prompt'"),
    "temperature": ({"temperature": -0.1}, "'temperature'"),
    "hot": ({"temperature": 2.1}, "'temperature'"),
    "top_p": ({"top_p": 1.1}, "'top_p'"),
    "min_p": ({"min_p": -0.1}, "'min_p'"),
    "top_k": ({"top_k": -1}, "'top_k'"),
    "presence_penalty": ({"presence_penalty": 2.5}, "'presence_penalty'"),
    "no tokens": ({"max_tokens": 0}, "'max_tokens'"),
    "many tokens": ({"max_tokens": 10**9}, "'max_tokens'"),
    "half a token": ({"max_tokens": 1.5}, "'max_tokens'"),
    "more than fits": ({"max_tokens": 32_768, "prompt": "cat " * 8_000}, "'max_tokens'"),
    "seed": ({"seed": -1}, "'seed'"),
    "thinking": ({"enable_thinking": "yes"}, "'enable_thinking'"),
    "unknown": ({"rewriter": "rewriter_general"}, "'rewriter'"),
}


@pytest.mark.parametrize("headers", [{}, EVENTS], ids=["JSON", "events"])
@pytest.mark.parametrize(("fields", "text"), REFUSED.values(), ids=REFUSED.keys())
async def test_refusals(client: httpx2.AsyncClient, fields: dict[str, Any], text: str, headers: dict[str, str]) -> None:
    answer = await client.post(URL, json={**BODY, **fields}, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
    assert text in answer.json()["detail"]
    assert (await client.post(URL, json={**BODY, "max_tokens": 1})).status_code == 200


@pytest.mark.parametrize("headers", [{}, EVENTS], ids=["JSON", "events"])
async def test_a_client_that_goes_away_ends_its_text(language: LanguageModel, headers: dict[str, str]) -> None:
    body = {**BODY, "max_tokens": 8_000}

    def writing(count: int) -> Callable[[httpx2.Response], bool]:
        return lambda answer: f'zimage_rewriter_writing{{service="rewriter"}} {count}.0' in answer.text

    async with (
        served(await app_of(language)) as url,
        httpx2.AsyncClient(base_url=url, trust_env=False, timeout=30) as client,
    ):
        await until(client, "/health/ready", lambda answer: answer.is_success)
        task = asyncio.create_task(client.post(URL, json=body, headers=headers))
        await until(client, "/metrics", writing(1))
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(client, "/metrics", writing(0))


async def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    statuses: list[int] = []
    app = await app_of(None, rewriter_backend="local", model_path=tmp_path / "gone")
    app.state.stop = statuses.append
    async with client_of(app, ready=False) as client:
        await eventually(lambda: statuses)
        assert "does not exist" in (await client.get("/health/ready")).json()["detail"]
        for headers in ({}, EVENTS):
            answer = await client.post(URL, json=BODY, headers=headers)
            assert (answer.status_code, answer.headers["content-type"]) == (503, PROBLEM)
    assert statuses == [78]


async def test_a_defect_within_a_stream_is_its_last_event(language: LanguageModel) -> None:
    batch: Any = language.batch
    advance = batch.advance

    def break_down() -> Any:
        if any(row.tokens for row in batch._rows):
            raise RuntimeError("a library's own text")
        return advance()

    batch.advance = break_down
    try:
        with capture_logs():
            async with client_of(await app_of(language)) as client:
                answer = await client.post(URL, json=BODY, headers=EVENTS)
    finally:
        del batch.advance
    last = events(answer.text)[-1] if answer.status_code == 200 else ("error", answer.json())
    assert last[0] == "error"
    assert last[1]["code"] == "internal_error"
    assert "library" not in answer.text


@pytest.fixture
def published(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A folder as language models are published: configuration, weights and tokenizer side by side."""
    folder = tmp_path / "Qwen3-tiny"
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny_checkpoint / part, folder, dirs_exist_ok=True)
    return folder


async def test_another_language_model(published: Path) -> None:
    async with client_of(await app_of(None, rewriter_model_path=published, rewriter_device="cpu")) as client:
        assert (await client.post(URL, json={**BODY, "max_tokens": 4})).status_code == 200
