"""The gateway's endpoints around prompts: formatting, encoding, saving, templates; and what it says of its health."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from inprocess import until
from safetensors import safe_open
from safetensors.torch import load_file

from services.encoder.model import TextEncoder
from shared.chat import Conversation, format_prompt
from shared.problems import MEDIA_TYPE as PROBLEM
from shared.templates import DEFAULT_DIR, load_templates

Start = Callable[..., AbstractAsyncContextManager[Any]]
TEMPLATES = load_templates(DEFAULT_DIR)
USER_CAT = "<|im_start|>user\nPaint a cat<|im_end|>\n<|im_start|>assistant\n"
PAINTER = "<|im_start|>system\nYou are a painter.<|im_end|>\n"


async def test_the_example_of_format_prompt(gateway: Any, text_encoder: TextEncoder) -> None:
    body = {
        "prompt": "Paint a cat",
        "system_prompt": "You are a painter.",
        "thinking_content": "Orange fur.",
        "assistant_content": None,
        "force_think_block": False,
        "strip_quotes": False,
        "template": None,
    }
    answer = await gateway.client.post("/api/format-prompt", json=body)
    formatted = f"{PAINTER}{USER_CAT}<think>\nOrange fur.\n</think>\n"
    assert answer.json() == {
        **body,
        "formatted_prompt": formatted,
        "char_count": len(formatted),
        "token_count": len(text_encoder.tokenize([formatted])[0]),
    }


@pytest.mark.parametrize(
    ("fields", "formatted"),
    [
        ({"prompt": "Paint a cat"}, USER_CAT),
        ({"prompt": "Paint a cat", "system_prompt": "You are a painter."}, PAINTER + USER_CAT),
        ({"prompt": "Paint a cat", "force_think_block": True}, f"{USER_CAT}<think>\n\n</think>\n"),
        ({"prompt": "Paint a cat", "assistant_content": "Here:"}, f"{USER_CAT}Here:"),
        ({"prompt": '"Paint" a cat', "strip_quotes": True}, USER_CAT),
    ],
)
async def test_formatted_prompts(gateway: Any, fields: dict[str, Any], formatted: str) -> None:
    answer = (await gateway.client.post("/api/format-prompt", json=fields)).json()
    assert answer["formatted_prompt"] == formatted
    assert answer["char_count"] == len(formatted)
    assert answer["prompt"] == fields["prompt"]


async def test_formatting_encodes_nothing(gateway: Any) -> None:
    await gateway.client.post("/api/format-prompt", json={"prompt": "A cat"})
    assert [request.url.path for request, _ in gateway.encoder.calls] == ["/v1/tokenize"]


@pytest.mark.parametrize("name", ["default", "photorealistic", "artistic"])
async def test_a_template_fills_what_the_request_leaves_out(gateway: Any, name: str) -> None:
    template = TEMPLATES.picture(name)
    answer = (await gateway.client.post("/api/format-prompt", json={"prompt": "A cat", "template": name})).json()
    expected = format_prompt(
        Conversation(
            prompt="A cat",
            system_prompt=template.system_prompt,
            thinking_content=template.thinking_content,
            assistant_content=template.assistant_content,
        )
    )
    assert answer["formatted_prompt"] == expected
    assert answer["template"] == name
    assert answer["system_prompt"] is None


async def test_explicit_fields_win_over_a_template(gateway: Any) -> None:
    fields = {"prompt": "A cat", "template": "photorealistic", "system_prompt": "", "thinking_content": "Mine."}
    answer = (await gateway.client.post("/api/format-prompt", json=fields)).json()
    assert answer["formatted_prompt"] == format_prompt(Conversation(prompt="A cat", thinking_content="Mine."))


async def test_the_example_of_encode(gateway: Any, text_encoder: TextEncoder) -> None:
    answer = (await gateway.client.post("/api/encode", json={"prompt": "A cat sleeping"})).json()
    formatted = "<|im_start|>user\nA cat sleeping<|im_end|>\n<|im_start|>assistant\n"
    tokens = len(text_encoder.tokenize([formatted])[0])
    seconds = answer.pop("encode_time")
    assert seconds >= 0
    assert answer == {
        "shape": [tokens, 64],
        "dtype": "torch.float32",
        "token_count": tokens,
        "prompt": "A cat sleeping",
        "formatted_prompt": formatted,
    }


async def test_encode_knows_the_layer(gateway: Any) -> None:
    for body, layer in (({"hidden_layer": -1}, -1), ({"hidden_layer": None}, -2), ({}, -2)):
        await gateway.client.post("/api/encode", json={"prompt": "A cat", **body})
        assert f'"layer":{layer}'.encode() in gateway.encoder.calls[-1][0].content.replace(b" ", b"")


async def test_saved_embeddings_are_what_was_encoded(gateway: Any, text_encoder: TextEncoder, tmp_path: Path) -> None:
    answer = (await gateway.client.post("/api/save-embeddings", json={"prompt": "A cat"})).json()
    path = Path(answer["path"])
    assert path.parent == tmp_path / "embeddings"
    assert path.name.startswith("embeddings_")
    formatted = format_prompt(Conversation(prompt="A cat"))
    tensors = load_file(path)
    assert list(tensors) == ["embeddings"]
    (expected,) = text_encoder.hidden_states(text_encoder.tokenize([formatted]), -2)
    assert tensors["embeddings"].equal(expected)
    assert answer["shape"] == list(expected.shape)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"formatted_prompt": formatted, "hidden_layer": "-2"}
    assert [item.name for item in path.parent.iterdir()] == [path.name]


async def test_the_same_embeddings_are_saved_under_the_same_name(gateway: Any, tmp_path: Path) -> None:
    paths = [
        (await gateway.client.post("/api/save-embeddings", json=body)).json()["path"]
        for body in (
            {"prompt": "A cat"},
            {"prompt": "A cat"},
            {"prompt": "A dog"},
            {"prompt": "A cat", "hidden_layer": -1},
        )
    ]
    assert paths[0] == paths[1]
    assert len(set(paths)) == 3
    assert len(list((tmp_path / "embeddings").iterdir())) == 3


@pytest.mark.parametrize("path", ["/api/encode", "/api/format-prompt", "/api/save-embeddings"])
@pytest.mark.parametrize(
    ("body", "status", "name"),
    [
        ({}, 422, "'prompt'"),
        ({"prompt": " "}, 422, "'prompt'"),
        ({"prompt": '"', "strip_quotes": True}, 422, "'prompt'"),
        ({"prompt": "a" * 32_001}, 422, "'prompt'"),
        ({"prompt": "a", "system_prompt": 1}, 422, "'system_prompt'"),
        ({"prompt": "a", "width": 64}, 422, "'width'"),
        ({"prompt": "a", "template": "nothing"}, 404, "template"),
        ({"prompt": "a", "template": "../../etc/passwd"}, 404, "template"),
    ],
)
async def test_bad_input(gateway: Any, path: str, body: dict[str, Any], status: int, name: str) -> None:
    answer = await gateway.client.post(path, json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    assert name in answer.json()["detail"]
    assert (await gateway.client.post(path, json={"prompt": "A cat"})).status_code == 200


@pytest.mark.parametrize("path", ["/api/encode", "/api/save-embeddings"])
async def test_a_layer_beyond_the_models_depth(gateway: Any, path: str) -> None:
    answer = await gateway.client.post(path, json={"prompt": "A cat", "hidden_layer": -5})
    assert answer.status_code == 422
    assert "'hidden_layer' must be between -4 and -1" in answer.json()["detail"]


async def test_templates(gateway: Any) -> None:
    templates = (await gateway.client.get("/api/templates")).json()["templates"]
    assert templates[0]["name"] == "default"
    by_name = {template["name"]: template for template in templates}
    assert len(by_name) == len(templates) >= 24
    assert by_name["photorealistic"]["has_thinking"] is True
    assert by_name["artistic"]["has_thinking"] is False
    assert not any(template["category"] == "rewriter" for template in templates)


async def test_every_template_in_the_list_can_be_used(gateway: Any) -> None:
    for template in (await gateway.client.get("/api/templates")).json()["templates"]:
        body = {"prompt": "A cat", "template": template["name"]}
        formatted = (await gateway.client.post("/api/format-prompt", json=body)).json()["formatted_prompt"]
        assert ("<think>" in formatted) is template["has_thinking"]
        assert "<|im_start|>user\nA cat<|im_end|>" in formatted


async def test_rewriters(gateway: Any) -> None:
    rewriters = (await gateway.client.get("/api/rewriters")).json()["rewriters"]
    assert {"name": "rewriter_character_generator", "description": "Character Generator (prompt rewriter)"} in rewriters
    assert all(set(rewriter) == {"name", "description"} for rewriter in rewriters)


async def test_other_templates(start_gateway: Start, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "own.md").write_text("---\nthinking_content: Think.\n---\nBe brief.")
    async with start_gateway(templates_dir=folder) as gateway:
        templates = (await gateway.client.get("/api/templates")).json()["templates"]
        assert [(template["name"], template["has_thinking"]) for template in templates] == [("own", True)]
        assert (await gateway.client.get("/api/rewriters")).json() == {"rewriters": []}


async def test_health(gateway: Any) -> None:
    health = (await gateway.client.get("/health")).json()
    assert health["status"] == "healthy"
    assert health["pipeline_loaded"] is health["encoder_loaded"] is True
    assert health["encoder_only_mode"] is False
    ready = {"status": "ready", "url": "http://encoder", "reason": None, "nodes": 1, "ready_nodes": 1}
    assert health["services"]["encoder"] == ready
    assert health["services"]["vl"]["status"] == "not_configured"


def raise_connect_error(_: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("a library's own text")


async def test_health_notices_a_service_that_goes_and_one_that_comes_back(
    gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.node.INTERVAL_S", 0.01)
    inner = gateway.diffusion.inner
    gateway.diffusion.inner = httpx2.MockTransport(raise_connect_error)
    await until(gateway.client, "/health", lambda answer: answer.json()["status"] == "degraded")
    health = (await gateway.client.get("/health")).json()
    assert (health["pipeline_loaded"], health["encoder_loaded"]) == (False, True)
    assert health["services"]["diffusion"]["status"] == "unreachable"
    assert "library" not in health["services"]["diffusion"]["reason"]
    assert (await gateway.client.get("/health/ready")).status_code == 503
    assert (await gateway.client.get("/health/live")).status_code == 200
    gateway.diffusion.inner = inner
    await until(gateway.client, "/health", lambda answer: answer.json()["status"] == "healthy")


async def test_without_redis_there_is_no_history(gateway: Any) -> None:
    for method, path in (("GET", "/api/history"), ("DELETE", "/api/history"), ("DELETE", "/api/history/0")):
        answer = await gateway.client.request(method, path)
        assert (answer.status_code, answer.json()["code"]) == (503, "unready")
    assert (await gateway.generate(steps=1)).headers["x-history"] == "unsaved"
