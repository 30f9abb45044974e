"""`POST /api/generate` through the real encoder and diffusion service on the tiny checkpoint."""

import asyncio
import io
import json
import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx2
import numpy as np
import pytest
import structlog
import torch
from fakes import parameters
from inprocess import eventually
from PIL import Image
from safetensors.torch import load as load_tensors

from services.diffusion.model import ZImageModel
from services.encoder.model import TextEncoder
from shared.chat import Conversation, format_prompt
from shared.errors import BY_CODE, QueueFull, ServiceError, Unauthorized, Unready
from shared.problems import MEDIA_TYPE as PROBLEM
from shared.problems import problem_response
from shared.wire import parse_header

Start = Callable[..., AbstractAsyncContextManager[Any]]


def states_of(encoder: TextEncoder, text: str, layer: int = -2) -> torch.Tensor:
    return encoder.hidden_states(encoder.tokenize([text]), layer)[0]


def pixels_of(response: httpx2.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    with Image.open(io.BytesIO(response.content)) as image:
        return np.asarray(image)


def drawn_by(model: ZImageModel, text: torch.Tensor, negative: torch.Tensor | None = None, **fields: Any) -> np.ndarray:
    picture = model.start(parameters(**fields), text, negative)
    while not picture.finished:
        model.step([picture])
    return model.decode([picture])[0]


def sent_parameters(gateway: Any) -> dict[str, Any]:
    """Without the time that is left, which is another each time."""
    request, _ = gateway.diffusion.calls[-1]
    sent = json.loads(parse_header(request.content).metadata["parameters"])
    assert 0 < sent.pop("timeout_s") <= 600
    return sent


def sent_texts(gateway: Any) -> tuple[list[str], int]:
    request, _ = gateway.encoder.calls[-1]
    body = json.loads(request.content)
    return body["input"], body["layer"]


def check_problem(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert (response.status_code, response.headers["content-type"]) == (status, PROBLEM), response.text
    problem: dict[str, Any] = response.json()
    assert problem["code"] == code
    assert problem["request_id"] == response.headers["x-request-id"]
    return problem


async def test_a_picture_of_a_prompt(gateway: Any, text_encoder: TextEncoder, zimage_model: ZImageModel) -> None:
    answer = await gateway.generate(prompt="A cat in the sun", width=96, seed=3)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-seed"] == "3"
    assert float(answer.headers["x-generation-time"]) > 0
    text = states_of(text_encoder, format_prompt(Conversation(prompt="A cat in the sun")))
    assert np.array_equal(pixels_of(answer), drawn_by(zimage_model, text, width=96, steps=2, seed=3))


async def test_each_stage_is_timed(gateway: Any) -> None:
    timing = (await gateway.generate()).headers["server-timing"]
    stages = [stage.partition(";dur=") for stage in timing.split(", ")]
    names = [name for name, _, _ in stages]
    assert [name for name in names if name != "history"] == ["encode", "queue", "denoise", "decode", "png", "total"]
    assert all(float(number) >= 0 for _, _, number in stages)


async def test_with_guidance_the_empty_prompt_is_the_negative(
    gateway: Any, text_encoder: TextEncoder, zimage_model: ZImageModel
) -> None:
    answer = await gateway.generate(guidance_scale=3.5, seed=1)
    formatted = format_prompt(Conversation(prompt="A cat"))
    empty = format_prompt(Conversation(prompt=""))
    assert sent_texts(gateway) == ([formatted, empty], -2)
    tensors = load_tensors(gateway.diffusion.calls[-1][0].content)
    assert set(tensors) == {"text", "negative"}
    text, negative = states_of(text_encoder, formatted), states_of(text_encoder, empty)
    torch.testing.assert_close(tensors["text"], text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tensors["negative"], negative, rtol=1e-5, atol=1e-5)
    expected = drawn_by(zimage_model, text, negative, steps=2, seed=1, guidance_scale=3.5)
    assert np.abs(pixels_of(answer).astype(int) - expected.astype(int)).max() <= 1


async def test_without_guidance_one_text_is_encoded_and_sent(gateway: Any) -> None:
    await gateway.generate()
    assert sent_texts(gateway) == ([format_prompt(Conversation(prompt="A cat"))], -2)
    assert set(load_tensors(gateway.diffusion.calls[-1][0].content)) == {"text"}


@pytest.mark.parametrize("guidance_scale", [0.0, 2.0])
async def test_the_tensors_bytes_pass_unchanged(gateway: Any, guidance_scale: float) -> None:
    await gateway.generate(guidance_scale=guidance_scale)
    received, sent = gateway.encoder.calls[-1][1], gateway.diffusion.calls[-1][0].content
    source, target = parse_header(received), parse_header(sent)
    pairs = [("hidden_states.0", "text"), ("hidden_states.1", "negative")][: len(target.tensors)]
    assert len(target.tensors) == (2 if guidance_scale else 1)
    for theirs, ours in pairs:
        assert sent[target.span(ours)] == received[source.span(theirs)]
        assert target.tensor(ours).dtype == source.tensor(theirs).dtype
    assert int(gateway.diffusion.calls[-1][0].headers["content-length"]) == len(sent)


async def test_the_request_id_reaches_both_services(gateway: Any) -> None:
    answer = await gateway.client.post(
        "/api/generate",
        json={"prompt": "A cat", "width": 64, "height": 64, "steps": 1},
        headers={"x-request-id": "my-request-1"},
    )
    assert answer.headers["x-request-id"] == "my-request-1"
    assert gateway.encoder.calls[-1][0].headers["x-request-id"] == "my-request-1"
    assert gateway.diffusion.calls[-1][0].headers["x-request-id"] == "my-request-1"


async def test_defaults_come_from_the_settings(start_gateway: Start) -> None:
    settings = {"width": 48, "height": 80, "steps": 1, "shift": 2.5, "hidden_layer": -3, "long_prompt_mode": "pool"}
    async with start_gateway(**settings) as gateway:
        answer = await gateway.client.post("/api/generate", json={"prompt": "A cat"})
        assert pixels_of(answer).shape == (80, 48, 3)
        sent = sent_parameters(gateway)
        seed = sent.pop("seed")
        assert str(seed) == answer.headers["x-seed"]
        assert sent == {
            "width": 48,
            "height": 80,
            "steps": 1,
            "shift": 2.5,
            "long_prompt_mode": "pool",
            "guidance_scale": 0.0,
        }
        assert sent_texts(gateway)[1] == -3
        nulls = dict.fromkeys([*settings, "seed", "guidance_scale"])
        answer = await gateway.client.post("/api/generate", json={"prompt": "A cat", **nulls})
        assert pixels_of(answer).shape == (80, 48, 3)


async def test_the_request_wins_over_the_settings(start_gateway: Start) -> None:
    async with start_gateway(width=48, guidance_scale=2.0, hidden_layer=-3) as gateway:
        fields = {
            "width": 32,
            "height": 32,
            "steps": 3,
            "seed": 2**63 - 1,
            "guidance_scale": 0,
            "shift": 1,
            "long_prompt_mode": "attention_pool",
        }
        answer = await gateway.generate(**fields, hidden_layer=-1)
        assert pixels_of(answer).shape == (32, 32, 3)
        assert sent_parameters(gateway) == fields
        assert sent_texts(gateway)[1] == -1


async def test_seed_0_is_a_seed(gateway: Any) -> None:
    first, second = await gateway.generate(seed=0), await gateway.generate(seed=0)
    assert first.headers["x-seed"] == "0"
    assert sent_parameters(gateway)["seed"] == 0
    assert np.array_equal(pixels_of(first), pixels_of(second))


async def test_a_drawn_seed_is_told_and_makes_the_picture_again(gateway: Any) -> None:
    first, second = await gateway.generate(seed=None), await gateway.generate()
    seeds = [int(answer.headers["x-seed"]) for answer in (first, second)]
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**32 for seed in seeds)
    again = await gateway.generate(seed=seeds[0])
    assert np.array_equal(pixels_of(again), pixels_of(first))
    assert not np.array_equal(pixels_of(second), pixels_of(first))


async def test_the_whole_conversation_is_encoded(gateway: Any) -> None:
    parts = {"system_prompt": "You are a painter.", "thinking_content": "Orange fur.", "assistant_content": "Here:"}
    await gateway.generate(prompt='A "red" cat', strip_quotes=True, **parts)
    assert sent_texts(gateway)[0] == [format_prompt(Conversation(prompt="A red cat", **parts))]


async def test_a_template_is_applied(gateway: Any) -> None:
    await gateway.generate(template="photorealistic", thinking_content="Mine.")
    (text,), _ = sent_texts(gateway)
    assert "<|im_start|>system\n" in text
    assert "<think>\nMine.\n</think>" in text


@pytest.mark.slow
async def test_a_prompt_beyond_the_text_limit(gateway: Any) -> None:
    pictures = [
        pixels_of(await gateway.generate(prompt="sun " * 6_000, seed=1, steps=1, long_prompt_mode=mode))
        for mode in ("truncate", "interpolate", "pool", "attention_pool")
    ]
    tokens = parse_header(gateway.diffusion.calls[-1][0].content).tensor("text").shape[0]
    assert tokens > 1504
    assert not np.array_equal(pictures[0], pictures[1])


async def test_the_parameters_stand_in_the_png(gateway: Any) -> None:
    answer = await gateway.generate(prompt="猫", seed=9, template="photorealistic")
    with Image.open(io.BytesIO(answer.content)) as image:
        told = json.loads(image.text["zimage"])
    assert (told["prompt"], told["seed"], told["steps"], told["hidden_layer"]) == ("猫", 9, 2, -2)
    again = {name: value for name, value in told.items() if value is not None}
    assert np.array_equal(pixels_of(await gateway.client.post("/api/generate", json=again)), pixels_of(answer))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"width": 4096, "height": 4096}, "'width' times 'height' must be at most 4200000 pixels, not 16777216"),
        ({"width": 8192, "height": 528}, "at most 4200000 pixels"),
        ({"width": 8192, "height": None}, "at most 4200000 pixels"),
    ],
)
async def test_a_picture_that_is_too_large(gateway: Any, fields: dict[str, Any], text: str) -> None:
    assert text in check_problem(await gateway.generate(**fields), 422, "invalid_field")["detail"]
    assert gateway.encoder.calls == gateway.diffusion.calls == []


async def test_the_largest_picture_is_a_setting(start_gateway: Start) -> None:
    async with start_gateway(max_pixels=64 * 64) as gateway:
        assert (await gateway.generate()).status_code == 200
        check_problem(await gateway.generate(width=80), 422, "invalid_field")


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": " \n"}, "prompt"),
    ({"prompt": '"""', "strip_quotes": True}, "prompt"),
    ({"prompt": "a" * 32_001}, "prompt"),
    ({"prompt": "nul\0"}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"system_prompt": 3}, "system_prompt"),
    ({"thinking_content": ["x"]}, "thinking_content"),
    ({"assistant_content": "a" * 32_001}, "assistant_content"),
    ({"force_think_block": "yes"}, "force_think_block"),
    ({"strip_quotes": None}, "strip_quotes"),
    ({"template": ""}, "template"),
    ({"width": 0}, "width"),
    ({"width": 1000}, "width"),
    ({"width": 8208}, "width"),
    ({"height": -16}, "height"),
    ({"height": "1024px"}, "height"),
    ({"steps": 0}, "steps"),
    ({"steps": 101}, "steps"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"guidance_scale": -1}, "guidance_scale"),
    ({"guidance_scale": 31}, "guidance_scale"),
    ({"shift": 0}, "shift"),
    ({"shift": 101}, "shift"),
    ({"long_prompt_mode": "squeeze"}, "long_prompt_mode"),
    ({"hidden_layer": 0}, "hidden_layer"),
    ({"hidden_layer": -5}, "hidden_layer"),
    ({"negative": "x"}, "negative"),
    ({"negative_prompt": 7}, "negative_prompt"),
    ({"cfg_normalization": -1}, "cfg_normalization"),
    ({"cfg_normalization": "on"}, "cfg_normalization"),
    ({"cfg_truncation": 1.1}, "cfg_truncation"),
    ({"num_images": 0}, "num_images"),
    ({"num_images": 9}, "num_images"),
    ({"num_images": 1.0}, "num_images"),
    ({"loras": "ink"}, "loras"),
    ({"loras": [{"name": "ink", "scale": 11}]}, "loras"),
    ({"loras": [{"scale": 1}]}, "loras"),
    ({"loras": [{"name": "x"}] * 9}, "loras"),
    ({"priority": "urgent"}, "priority"),
    ({"timeout_s": 0}, "timeout_s"),
    ({"timeout_s": "soon"}, "timeout_s"),
    ({"preview_every": -1}, "preview_every"),
    ({"seed": 2**63 - 2, "num_images": 3}, "seed"),
]


@pytest.mark.parametrize(
    ("fields", "name"), BAD_FIELDS, ids=[f"{name}-{index}" for index, (_, name) in enumerate(BAD_FIELDS)]
)
async def test_bad_fields_are_named_and_the_next_request_works(gateway: Any, fields: dict[str, Any], name: str) -> None:
    problem = check_problem(await gateway.generate(**fields), 422, "invalid_field")
    assert re.search(rf"'{name}['.\[]", problem["detail"])
    assert (await gateway.generate(steps=1)).status_code == 200


@pytest.mark.parametrize(
    "name", ["nothing", "../../etc/passwd", "/etc/passwd", "%2e%2e%2f", "..\\x", "rewriter_general"]
)
async def test_unknown_templates(gateway: Any, name: str) -> None:
    problem = check_problem(await gateway.generate(template=name), 404, "not_found")
    assert "/api/templates" in problem["detail"]
    assert gateway.encoder.calls == []


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {"content-type": "application/json"}, 400),
        (b"[" * 100_000, {"content-type": "application/json"}, 400),
        (b'{"prompt": "a", "width": NaN}', {"content-type": "application/json"}, 422),
        (b'{"prompt": "a", "shift": 1e400}', {"content-type": "application/json"}, 422),
        (b'{"prompt": "\\ud800"}', {"content-type": "application/json"}, 422),
        (b'{"prompt": "a"}', {"content-type": "text/plain"}, 415),
        (b"prompt=a", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b" " * ((2 << 20) + 1), {"content-type": "application/json"}, 413),
        (b"", {"content-type": "application/json"}, 422),
        (b"[]", {"content-type": "application/json"}, 422),
    ],
)
async def test_bodies_that_cannot_be_used(gateway: Any, content: bytes, headers: dict[str, str], status: int) -> None:
    answer = await gateway.client.post("/api/generate", content=content, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    assert (await gateway.generate(steps=1)).status_code == 200


def refuse_with(error: ServiceError) -> Callable[[httpx2.Request], httpx2.Response]:
    problem = problem_response(error, "id-of-the-service")

    def answer(_: httpx2.Request) -> httpx2.Response:
        stream = httpx2.ByteStream(bytes(problem.body))
        return httpx2.Response(problem.status_code, headers=list(problem.headers.items()), stream=stream)

    return answer


@pytest.mark.slow
@pytest.mark.parametrize("service", ["encoder", "diffusion"])
@pytest.mark.parametrize(
    "kind", [kind for kind in BY_CODE.values() if kind is not Unauthorized], ids=lambda kind: kind.code
)
async def test_a_services_refusal_is_the_gateways(start_gateway: Start, kind: type[ServiceError], service: str) -> None:
    with structlog.testing.capture_logs():
        async with start_gateway(resend_timeout_s=0) as gateway:
            getattr(gateway, service).instead = refuse_with(kind("A sentence of the service.", retry_after_s=4))
            problem = check_problem(await gateway.generate(), kind.status, kind.code)
            assert "A sentence of the service." in problem["detail"]
            getattr(gateway, service).instead = None
            assert (await gateway.generate()).status_code == 200


@pytest.mark.parametrize("service", ["encoder", "diffusion"])
async def test_a_service_with_another_token_is_not_the_clients_affair(gateway: Any, service: str) -> None:
    getattr(gateway, service).instead = refuse_with(Unauthorized("A sentence of the service."))
    problem = check_problem(await gateway.generate(), 502, "bad_upstream")
    assert problem["detail"] == f"The {service} service does not accept this one's token."


async def test_a_full_queue_says_when_to_try_again(gateway: Any) -> None:
    gateway.diffusion.instead = refuse_with(QueueFull("32 pictures are waiting.", retry_after_s=5))
    answer = await gateway.generate()
    check_problem(answer, 429, "queue_full")
    assert answer.headers["retry-after"] == "5"


def raise_connect_error(_: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("a library's own text")


def answer_garbage(_: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(200, headers={"content-type": "image/png"}, stream=httpx2.ByteStream(b"secret" * 9))


@pytest.mark.parametrize("service", ["encoder", "diffusion"])
@pytest.mark.parametrize(
    ("instead", "status", "code"), [(raise_connect_error, 503, "unreachable"), (answer_garbage, 502, "bad_upstream")]
)
async def test_a_service_that_fails(gateway: Any, service: str, instead: Any, status: int, code: str) -> None:
    getattr(gateway, service).instead = instead
    answer = await gateway.generate()
    assert service in check_problem(answer, status, code)["detail"]
    assert "secret" not in answer.text
    assert "library" not in answer.text


async def test_a_picture_that_takes_too_long(start_gateway: Start) -> None:
    async with start_gateway(generate_timeout_s=0.3) as gateway:
        gateway.model.gate.clear()
        problem = check_problem(await gateway.generate(), 504, "upstream_timeout")
        assert problem["detail"] == "The picture was not ready within 0.3 s."


async def test_a_client_that_goes_away_stops_the_work(gateway: Any) -> None:
    gone = asyncio.Event()
    body = json.dumps({"prompt": "A cat", "width": 64, "height": 64, "steps": 100, "seed": 1}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    running = gateway.client._transport.app
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/api/generate", "headers": headers, "query_string": b""}
    gateway.model.gate.clear()
    request = asyncio.create_task(running(scope, receive, send))
    await eventually(gateway.model.entered.is_set)
    gone.set()
    await request
    gateway.model.gate.set()
    assert (await gateway.generate(seed=2)).status_code == 200
    assert gateway.model.steps.count((1,)) == 1
    assert sent[0]["status"] == 499


async def test_many_at_once_do_not_mix(gateway: Any, text_encoder: TextEncoder, zimage_model: ZImageModel) -> None:
    prompts = [f"cat number {number} " * (number + 1) for number in range(6)]
    answers = await asyncio.gather(*(gateway.generate(prompt=prompt, seed=n) for n, prompt in enumerate(prompts)))
    for seed, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = states_of(text_encoder, format_prompt(Conversation(prompt=prompt)))
        expected = drawn_by(zimage_model, text, steps=2, seed=seed)
        assert np.abs(pixels_of(answer).astype(int) - expected.astype(int)).max() <= 1


async def test_encoder_only(start_gateway: Start) -> None:
    with structlog.testing.capture_logs():
        async with start_gateway(encoder_only=True) as gateway:
            problem = check_problem(await gateway.generate(), Unready.status, "unready")
            assert "--encoder-only" in problem["detail"]
            assert (await gateway.client.post("/api/encode", json={"prompt": "A cat"})).status_code == 200
            health = (await gateway.client.get("/health")).json()
    assert (health["status"], health["encoder_only_mode"], health["pipeline_loaded"]) == ("healthy", True, False)
