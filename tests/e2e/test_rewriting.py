"""Prompts are rewritten by a server as it is started by default: on the encoder's weights."""

import json
from urllib.parse import unquote

import httpx2
import pytest
from servers import Running, picture

pytestmark = pytest.mark.slow
REWRITE = {"custom_system_prompt": "Expand the prompt.", "max_tokens": 24, "seed": 8}


def test_the_weights_are_in_memory_once(server: Running) -> None:
    encoder, rewriter = server.service("encoder"), server.service("rewriter")
    assert encoder is not None
    assert rewriter is not None
    assert rewriter.memory_info().rss < encoder.memory_info().rss / 2, "the rewriter has no torch and no weights"


def test_in_one_go_is_the_same_as_one_after_the_other(client: httpx2.Client) -> None:
    client.delete("/api/history").raise_for_status()
    rewritten = client.post("/api/rewrite", json={"prompt": "A cat sleeping", **REWRITE}).json()
    assert rewritten["backend"] == "local"
    prompt, thinking = rewritten["rewritten_prompt"], rewritten["thinking_content"]
    apart = client.post("/api/generate", json=picture(prompt=prompt, thinking_content=thinking))
    at_once = client.post("/api/generate", json=picture(prompt="A cat sleeping", rewrite=REWRITE))
    assert at_once.status_code == 200, at_once.text
    assert at_once.content == apart.content
    assert unquote(at_once.headers["x-prompt"]) == prompt
    assert unquote(at_once.headers["x-original-prompt"]) == "A cat sleeping"
    first, second = client.get("/api/history", params={"images": "none"}).json()["history"]
    assert (first["prompt"], first["original_prompt"]) == (prompt, None)
    assert (second["prompt"], second["original_prompt"]) == (prompt, "A cat sleeping")
    assert second["thinking_content"] == thinking
    assert client.delete("/api/history/1").json()["deleted"]["original_prompt"] == "A cat sleeping"


def test_events_of_both(client: httpx2.Client) -> None:
    body = picture(prompt="A cat sleeping", rewrite=REWRITE)
    with client.stream("POST", "/api/generate", json=body, headers={"accept": "text/event-stream"}) as answer:
        told = [(event.event, json.loads(event.data)) for event in httpx2.EventSource(answer)]
    names = [name for name, _ in told]
    assert (names[0], names[-1]) == ("rewritten", "done")
    assert told[0][1]["original_prompt"] == "A cat sleeping"
