"""`POST /api/generate` beyond one picture: events, several pictures, guidance, giving up, a restarted service."""

import asyncio
import base64
import email
import email.policy
import io
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx2
import numpy as np
import pytest
from fakes import message, parameters
from inprocess import eventually
from PIL import Image
from safetensors.torch import load as load_tensors

from services.diffusion.model import ZImageModel
from services.encoder.model import TextEncoder
from shared.chat import Conversation, format_prompt
from shared.errors import DeviceFailed, NotBegun, QueueFull, ServiceError
from shared.problems import MEDIA_TYPE as PROBLEM
from shared.problems import problem_response
from shared.wire import parse_header

Start = Callable[..., AbstractAsyncContextManager[Any]]
EVENTS = {"accept": "text/event-stream"}


def pixels_of(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


def parameters_in(png: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(png)) as image:
        told: dict[str, Any] = json.loads(image.text["zimage"])
    return told


def events_of(answer: httpx2.Response) -> list[tuple[str, dict[str, Any]]]:
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    return [(event.event, json.loads(event.data)) for event in httpx2.EventSource(answer, max_event_size=None)]


def check_problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM), answer.text
    problem: dict[str, Any] = answer.json()
    assert problem["code"] == code
    return problem


def sent(gateway: Any) -> list[dict[str, Any]]:
    return [json.loads(parse_header(call.content).metadata["parameters"]) for call, _ in gateway.diffusion.calls]


async def generate(gateway: Any, headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
    body = {"prompt": "A cat", "width": 64, "height": 64, "steps": 2, "seed": 5, **fields}
    return await gateway.client.post("/api/generate", json=body, headers=headers)


class TestEvents:
    """What a client is told that asks for events."""

    async def test_from_the_queue_to_the_picture(self, gateway: Any) -> None:
        answer = await generate(gateway, {**EVENTS, "x-request-id": "picture-1"}, steps=4, preview_every=2)
        told = events_of(answer)
        assert [name for name, _ in told] == ["queued", "step", "step", "preview", "step", "step", "done"]
        assert all(fields["index"] == 0 for _, fields in told)
        assert told[0][1] == {"index": 0, "id": "picture-1", "place": 1}
        assert told[1][1].keys() == {"index", "step", "steps", "seconds_left"}
        assert Image.open(io.BytesIO(base64.b64decode(told[3][1]["image_b64"]))).size == (8, 8)
        plain = await generate(gateway, steps=4, preview_every=2)
        done = told[-1][1]
        assert base64.b64decode(done["image_b64"], validate=True) == plain.content
        assert done["headers"].keys() == {"X-Seed", "X-Generation-Time", "Server-Timing", "X-History"}
        assert done["headers"]["X-Seed"] == "5"
        assert answer.headers["x-request-id"] == "picture-1"

    async def test_previews_come_as_often_as_the_server_says(self, start_gateway: Start) -> None:
        async with start_gateway(preview_every=1) as gateway:
            names = [name for name, _ in events_of(await generate(gateway, EVENTS))]
            assert names.count("preview") == 1
            names = [name for name, _ in events_of(await generate(gateway, EVENTS, preview_every=0))]
            assert "preview" not in names

    async def test_several_pictures(self, gateway: Any) -> None:
        told = events_of(await generate(gateway, EVENTS, num_images=3))
        done = {fields["index"]: fields for name, fields in told if name == "done"}
        assert {index: one["headers"]["X-Seed"] for index, one in done.items()} == {0: "5", 1: "6", 2: "7"}
        assert [fields["step"] for name, fields in told if name == "step" and fields["index"] == 1] == [1, 2]

    @pytest.mark.parametrize("fields", [{"width": 65}, {"template": "nope"}, {"loras": [{"name": "nope"}]}])
    async def test_what_is_refused_is_no_stream(self, gateway: Any, fields: dict[str, Any]) -> None:
        answer = await generate(gateway, EVENTS, **fields)
        assert answer.status_code == (422 if "width" in fields else 404)
        assert answer.headers["content-type"] == PROBLEM

    async def test_what_fails_later_is_an_event(self, gateway: Any) -> None:
        gateway.model.break_next.append(RuntimeError("a library's own text"))
        answer = await generate(gateway, EVENTS)
        name, problem = events_of(answer)[-1]
        assert (name, problem["code"]) == ("error", "internal_error")
        assert problem["request_id"] == answer.headers["x-request-id"]

    async def test_an_answer_that_ends_too_early(self, gateway: Any) -> None:
        stream = b'event: queued\ndata: {"id": "x", "place": 1}\n\n'
        gateway.diffusion.instead = lambda _: httpx2.Response(
            200, headers={"content-type": "text/event-stream"}, content=stream
        )
        name, problem = events_of(await generate(gateway, EVENTS))[-1]
        assert (name, problem["code"]) == ("error", "bad_upstream")

    @pytest.mark.slow
    @pytest.mark.parametrize("event", [b"event: sing\ndata: {}", b"event: step\ndata: 7", b"event: done\ndata: {"])
    async def test_an_answer_that_makes_no_sense(self, gateway: Any, event: bytes) -> None:
        gateway.diffusion.instead = lambda _: httpx2.Response(
            200, headers={"content-type": "text/event-stream"}, content=event + b"\n\n"
        )
        check_problem(await generate(gateway, EVENTS), 502, "bad_upstream")


class TestSeveral:
    """Several pictures of one prompt."""

    async def test_as_parts(self, gateway: Any) -> None:
        answer = await generate(gateway, num_images=3)
        assert answer.status_code == 200, answer.text
        head = f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode()
        message = email.message_from_bytes(head + answer.content, policy=email.policy.HTTP)
        assert message.get_content_type() == "multipart/mixed"
        parts = list(message.iter_parts())
        assert [(part.get_content_type(), part["X-Seed"]) for part in parts] == [
            ("image/png", seed) for seed in ("5", "6", "7")
        ]
        for part in parts:
            alone = await generate(gateway, seed=int(part["X-Seed"]))
            png = part.get_payload(decode=True)
            assert np.abs(pixels_of(png).astype(int) - pixels_of(alone.content).astype(int)).max() <= 1
            assert parameters_in(png)["seed"] == int(part["X-Seed"])
            assert "num_images" not in parameters_in(png)
        assert answer.headers["x-seed"] == "5"

    async def test_as_json(self, gateway: Any) -> None:
        answer = await generate(gateway, {"accept": "application/json, */*"}, num_images=2)
        assert answer.headers["content-type"] == "application/json"
        images = answer.json()["images"]
        assert [one["headers"]["X-Seed"] for one in images] == ["5", "6"]
        pictures = [pixels_of(base64.b64decode(one["image_b64"], validate=True)) for one in images]
        assert not np.array_equal(*pictures)

    async def test_one_is_a_png_whatever_the_client_accepts(self, gateway: Any) -> None:
        for accept in ("application/json", "multipart/mixed", "*/*"):
            answer = await generate(gateway, {"accept": accept}, num_images=1)
            assert answer.headers["content-type"] == "image/png"

    async def test_the_prompt_is_encoded_once_and_the_steps_are_shared(self, gateway: Any) -> None:
        await generate(gateway, num_images=4, steps=6)
        assert len(gateway.encoder.calls) == 1
        assert sorted(one["seed"] for one in sent(gateway)) == [5, 6, 7, 8]
        assert max(len(group) for group in gateway.model.steps) > 1

    async def test_a_drawn_seed_counts_up(self, gateway: Any) -> None:
        answer = await generate(gateway, {"accept": "application/json"}, seed=None, num_images=2)
        seeds = [int(one["headers"]["X-Seed"]) for one in answer.json()["images"]]
        assert seeds[1] == seeds[0] + 1

    async def test_seeds_beyond_the_largest(self, gateway: Any) -> None:
        problem = check_problem(await generate(gateway, seed=2**63 - 2, num_images=3), 422, "invalid_field")
        assert problem["detail"] == f"'seed' must be at most {2**63 - 3} for 3 pictures."
        assert (await generate(gateway, seed=2**63 - 2, num_images=2)).status_code == 200

    async def test_when_one_fails_the_others_are_given_up(self, gateway: Any) -> None:
        def break_group(group: Any) -> Exception | None:
            return QueueFull("no") if any(one.parameters.seed == 6 for one in group) else None

        gateway.model.break_group = break_group
        check_problem(await generate(gateway, num_images=3, steps=100), 429, "queue_full")
        gateway.model.break_group = lambda _: None
        assert (await generate(gateway)).status_code == 200


class TestGuidance:
    """The negative prompt, and diffusers' two options of guidance."""

    async def test_the_negative_prompt_is_steered_away_from(
        self, gateway: Any, text_encoder: TextEncoder, zimage_model: ZImageModel
    ) -> None:
        answer = await generate(gateway, negative_prompt="A dog", guidance_scale=3.0)
        texts = [format_prompt(Conversation(prompt=prompt)) for prompt in ("A cat", "A dog")]
        assert json.loads(gateway.encoder.calls[-1][0].content)["input"] == texts
        negative = text_encoder.hidden_states(text_encoder.tokenize([texts[1]]), -2)[0]
        tensors = load_tensors(gateway.diffusion.calls[-1][0].content)
        assert np.allclose(tensors["negative"], negative, atol=1e-5)
        wanted = parameters(steps=2, seed=5, guidance_scale=3.0)
        picture = zimage_model.start(wanted, tensors["text"], tensors["negative"])
        while not picture.finished:
            zimage_model.step([picture])
        assert np.array_equal(pixels_of(answer.content), zimage_model.decode([picture])[0])
        other = await generate(gateway, guidance_scale=3.0)
        assert not np.array_equal(pixels_of(answer.content), pixels_of(other.content))

    async def test_without_guidance_it_is_not_looked_at(self, gateway: Any) -> None:
        plain, ignored = await generate(gateway), await generate(gateway, negative_prompt="A dog")
        assert np.array_equal(pixels_of(plain.content), pixels_of(ignored.content))
        assert len(json.loads(gateway.encoder.calls[-1][0].content)["input"]) == 1

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"cfg_normalization": True}, {"cfg_normalization": 1.0}),
            ({"cfg_normalization": 0.5}, {"cfg_normalization": 0.5}),
            ({"cfg_normalization": False}, {}),
            ({"cfg_truncation": 0.5}, {"cfg_truncation": 0.5}),
            ({"cfg_truncation": 1}, {}),
            ({"priority": "high"}, {"priority": "high"}),
        ],
    )
    async def test_options_are_passed_on(self, gateway: Any, fields: dict[str, Any], expected: dict[str, Any]) -> None:
        answer = await generate(gateway, guidance_scale=2.0, **fields)
        assert answer.status_code == 200, answer.text
        told = sent(gateway)[-1]
        assert {name: told[name] for name in fields if name in told} == expected

    async def test_they_stand_in_the_png_and_make_it_again(self, gateway: Any) -> None:
        fields = {"negative_prompt": "A dog", "guidance_scale": 3.0, "cfg_normalization": 0.7, "cfg_truncation": 0.4}
        answer = await generate(gateway, **fields)
        told = parameters_in(answer.content)
        assert {name: told[name] for name in fields} == fields
        assert not {"num_images", "priority", "timeout_s", "preview_every"} & told.keys()
        again = await gateway.client.post("/api/generate", json=told)
        assert np.array_equal(pixels_of(again.content), pixels_of(answer.content))


class TestGivingUp:
    """`DELETE /api/generate/{id}` and `timeout_s`."""

    @pytest.mark.parametrize("num_images", [1, 3])
    async def test_by_the_id(self, gateway: Any, num_images: int) -> None:
        gateway.model.gate.clear()
        drawing_it = asyncio.create_task(
            generate(gateway, {"x-request-id": "picture-1"}, steps=100, num_images=num_images)
        )
        await eventually(gateway.model.entered.is_set)
        gone = await gateway.client.delete("/api/generate/picture-1")
        assert gone.json() == {"cancelled": "picture-1"}
        check_problem(await drawing_it, 409, "cancelled")
        gateway.model.gate.set()
        steps = len(gateway.model.steps)
        assert (await generate(gateway)).status_code == 200
        assert len(gateway.model.steps) <= steps + 1 + 2
        check_problem(await gateway.client.delete("/api/generate/picture-1"), 404, "not_found")

    async def test_of_a_stream_before_its_first_event(self, gateway: Any) -> None:
        gateway.model.gate.clear()
        following = asyncio.create_task(generate(gateway, {**EVENTS, "x-request-id": "picture-1"}, steps=100))
        await eventually(gateway.model.entered.is_set)
        assert (await gateway.client.delete("/api/generate/picture-1")).status_code == 200
        gateway.model.gate.set()
        check_problem(await following, 409, "cancelled")

    async def test_of_another_gateway(self, gateway: Any) -> None:
        """Which this one knows nothing of, but the diffusion service does."""
        gateway.model.gate.clear()
        headers = {"x-request-id": "picture-1", "content-type": "application/vnd.safetensors"}
        direct = httpx2.AsyncClient(transport=gateway.diffusion.inner, base_url="http://diffusion", timeout=None)
        drawing_it = asyncio.create_task(direct.post("/v1/generate", content=message(steps=100), headers=headers))
        await eventually(gateway.model.entered.is_set)
        assert (await gateway.client.delete("/api/generate/picture-1")).status_code == 200
        gateway.model.gate.set()
        assert (await drawing_it).json()["code"] == "cancelled"

    async def test_a_deadline_of_the_request(self, gateway: Any) -> None:
        gateway.model.gate.clear()
        problem = check_problem(await generate(gateway, timeout_s=0.3), 504, "upstream_timeout")
        assert problem["detail"] == "The picture was not ready within 0.3 s."
        gateway.model.gate.set()
        assert (await generate(gateway)).status_code == 200

    async def test_the_servers_deadline_holds_too(self, start_gateway: Start) -> None:
        async with start_gateway(generate_timeout_s=0.3) as gateway:
            gateway.model.gate.clear()
            problem = check_problem(await generate(gateway, timeout_s=60), 504, "upstream_timeout")
            assert "within 0.3 s" in problem["detail"]


def refusing(error: ServiceError, times: int) -> Callable[[httpx2.Request], httpx2.Response | None]:
    left = [error] * times

    def answer(_: httpx2.Request) -> httpx2.Response | None:
        if not left:
            return None
        response = problem_response(left.pop(), "1" * 32)
        return httpx2.Response(
            response.status_code, headers=response.headers, stream=httpx2.ByteStream(bytes(response.body))
        )

    return answer


class TestAServiceThatStartsAnew:
    """Pictures are sent again: those that had not been begun until time is up, those that had been twice."""

    @pytest.mark.slow
    @pytest.mark.parametrize("headers", [{}, EVENTS])
    async def test_what_was_not_begun_is_sent_again(self, gateway: Any, headers: dict[str, str]) -> None:
        gateway.diffusion.instead = refusing(NotBegun("The device failed."), 2)
        answer = await generate(gateway, headers)
        assert answer.status_code == 200
        if headers:
            assert events_of(answer)[-1][0] == "done"

    async def test_not_for_ever(self, start_gateway: Start) -> None:
        async with start_gateway(resend_timeout_s=0.1) as gateway:
            gateway.diffusion.instead = refusing(NotBegun("The device failed."), 10_000)
            check_problem(await generate(gateway), 503, "not_begun")

    @pytest.mark.slow
    @pytest.mark.parametrize("headers", [{}, EVENTS])
    async def test_what_was_begun_is_begun_again(self, gateway: Any, headers: dict[str, str]) -> None:
        undisturbed = await generate(gateway, seed=5)
        gateway.diffusion.instead = refusing(DeviceFailed("The device failed."), 2)
        answer = await generate(gateway, headers, seed=5)
        assert answer.status_code == 200
        if headers:
            names = [name for name, _ in events_of(answer)]
            assert (names[0], names[-1]) == ("queued", "done")
        else:
            assert answer.headers["x-seed"] == undisturbed.headers["x-seed"]
            assert np.array_equal(pixels_of(answer.content), pixels_of(undisturbed.content))

    @pytest.mark.slow
    async def test_but_not_what_ends_one_service_after_the_other(self, gateway: Any) -> None:
        gateway.diffusion.instead = refusing(DeviceFailed("The device failed.", retry_after_s=5), 3)
        answer = await generate(gateway)
        check_problem(answer, 503, "device_failed")
        assert answer.headers["retry-after"] == "5"
        assert (await generate(gateway)).status_code == 200


async def test_the_loras_of_a_server_without_a_folder(gateway: Any) -> None:
    assert (await gateway.client.get("/api/loras")).json() == {"loras": []}
    problem = check_problem(await generate(gateway, loras=[{"name": "ink"}]), 404, "not_found")
    assert "'ink'" in problem["detail"]
    assert (await generate(gateway, loras=[])).status_code == 200


async def test_a_list_of_loras_that_makes_no_sense(gateway: Any) -> None:
    gateway.diffusion.instead = lambda _: httpx2.Response(200, stream=httpx2.ByteStream(b'{"files": []}'))
    check_problem(await gateway.client.get("/api/loras"), 502, "bad_upstream")


async def test_a_server_without_diffusion_has_none_of_it(start_gateway: Start) -> None:
    async with start_gateway(encoder_only=True) as gateway:
        check_problem(await gateway.client.get("/api/loras"), 503, "unready")
        check_problem(await gateway.client.delete("/api/generate/picture-1"), 503, "unready")
        check_problem(await generate(gateway, EVENTS), 503, "unready")
