"""The diffusion service's HTTP interface, served by a real process: embeddings in, a picture or a refusal out."""

import json
import struct
from collections.abc import Mapping
from typing import Any

import httpx2
import numpy as np
import pytest
from servers import png_size

from shared.schemas.diffusion import PARAMETERS
from shared.wire import MEDIA_TYPE, TensorMeta, build_header

pytestmark = pytest.mark.slow
WIDTH = 64  # of the tiny checkpoint's hidden states
HEADERS = {"content-type": MEDIA_TYPE}
WANTED = {
    "width": 64,
    "height": 32,
    "steps": 2,
    "seed": 1,
    "guidance_scale": 0.0,
    "shift": 3.0,
    "long_prompt_mode": "interpolate",
}
NAMES = {"float32": "F32", "float16": "F16", "int8": "I8", "float64": "F64"}


def message(parameters: Mapping[str, Any] | str | None = None, **tensors: Any) -> bytes:
    """A request's body; `parameters` are merged into `WANTED`, or stand as they are when they are a text."""
    metas = [TensorMeta(name, NAMES[str(item.dtype)], item.shape) for name, item in tensors.items()]
    text = parameters if isinstance(parameters, str) else json.dumps(WANTED | dict(parameters or {}))
    return build_header(metas, {PARAMETERS: text}) + b"".join(item.tobytes() for item in tensors.values())


def states(*shape: int, dtype: str = "float32") -> Any:
    """Numbers that could be hidden states."""
    return np.random.default_rng(0).standard_normal(shape or (10, WIDTH)).astype(dtype)


def with_value(value: float) -> Any:
    """Hidden states of which one number is this."""
    broken = states()
    broken[3, 5] = value
    return broken


def raw(header: Any, data: bytes = b"") -> bytes:
    """A safetensors body with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = message(text=states())
METADATA = {"__metadata__": {PARAMETERS: json.dumps(WANTED)}}
ROWS = {"dtype": "F32", "shape": [1, WIDTH], "data_offsets": [0, 4 * WIDTH]}
BROKEN = {
    "NaN": message(text=with_value(np.nan)),
    "infinity": message(text=with_value(np.inf)),
    "NaN in the negative": message({"guidance_scale": 2.0}, text=states(), negative=with_value(np.nan)),
    "too wide": message(text=states(10, WIDTH + 1)),
    "too narrow": message(text=states(10, 8)),
    "rank 3": message(text=states(1, 10, WIDTH)),
    "rank 1": message(text=states(WIDTH)),
    "int8": message(text=states(dtype="int8")),
    "float64": message(text=states(dtype="float64")),
    "no rows": message(text=states(0, WIDTH)),
    "a million rows": build_header([TensorMeta("text", "F32", (10**6, WIDTH))], {PARAMETERS: json.dumps(WANTED)}),
    "no text": message(negative=states()),
    "guidance without a negative": message({"guidance_scale": 2.0}, text=states()),
    "empty": b"",
    "no header": b"\x05\x00\x00",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header is not JSON": raw(b"{not json"),
    "header is a list": raw([]),
    "header nested deep": raw(b"[" * 100_000),
    "unknown dtype": raw({**METADATA, "text": {**ROWS, "dtype": "F7"}}, bytes(4 * WIDTH)),
    "negative shape": raw({**METADATA, "text": {**ROWS, "shape": [-1, WIDTH]}}, bytes(4 * WIDTH)),
    "overlapping offsets": raw({**METADATA, "text": ROWS, "negative": ROWS}, bytes(4 * WIDTH)),
    "truncated": GOOD[:-1],
    "too long": GOOD + b"\0",
    "no parameters": build_header([TensorMeta("text", "F32", (1, WIDTH))]) + bytes(4 * WIDTH),
    "parameters of another kind": message("[]", text=states()),
    "an unknown parameter": message({"prompt": "x"}, text=states()),
    "a width off the grid": message({"width": 65}, text=states()),
    "too many steps": message({"steps": 101}, text=states()),
    "too many pixels": message({"width": 8192, "height": 8192}, text=states()),
    "an unknown mode": message({"long_prompt_mode": "nope"}, text=states()),
}


def test_a_picture(diffusion: httpx2.Client) -> None:
    answer = diffusion.post("/v1/generate", content=GOOD, headers=HEADERS)
    assert answer.status_code == 200, answer.text
    assert png_size(answer.content) == (64, 32)
    assert [stage.split(";")[0] for stage in answer.headers["server-timing"].split(", ")] == [
        "queue",
        "denoise",
        "decode",
        "png",
    ]


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_body_is_refused_and_the_next_works(diffusion: httpx2.Client, body: bytes) -> None:
    refused = diffusion.post("/v1/generate", content=body, headers=HEADERS)
    assert refused.status_code == 422, refused.text
    assert refused.headers["content-type"] == "application/problem+json"
    problem = refused.json()
    assert problem["code"] == "invalid_field"
    assert problem["detail"].endswith(".")
    assert problem["request_id"] == refused.headers["x-request-id"]
    again = diffusion.post("/v1/generate", content=GOOD, headers=HEADERS)
    assert png_size(again.content) == (64, 32)


def test_parameters_that_are_not_json(diffusion: httpx2.Client) -> None:
    refused = diffusion.post("/v1/generate", content=message("{", text=states()), headers=HEADERS)
    assert (refused.status_code, refused.json()["code"]) == (400, "malformed_body")


def test_another_content_type(diffusion: httpx2.Client) -> None:
    refused = diffusion.post("/v1/generate", content=GOOD, headers={"content-type": "application/json"})
    assert (refused.status_code, refused.json()["code"]) == (415, "wrong_content_type")


def test_the_width_of_the_error_is_named(diffusion: httpx2.Client) -> None:
    refused = diffusion.post("/v1/generate", content=BROKEN["too wide"], headers=HEADERS)
    assert f"[tokens, {WIDTH}]" in refused.json()["detail"]


@pytest.mark.parametrize("mode", ["truncate", "interpolate", "pool", "attention_pool"])
def test_text_beyond_the_limit(diffusion: httpx2.Client, mode: str) -> None:
    limit = diffusion.get("/v1/model").json()["text_limit"]
    body = message({"long_prompt_mode": mode}, text=states(limit + 77, WIDTH))
    assert png_size(diffusion.post("/v1/generate", content=body, headers=HEADERS).content) == (64, 32)


def test_facts_and_queue(diffusion: httpx2.Client) -> None:
    model = diffusion.get("/v1/model").json()
    assert (model["device"], model["dtype"], model["text_width"], model["text_limit"]) == (
        "cpu",
        "float32",
        WIDTH,
        1504,
    )
    assert diffusion.get("/v1/queue").json() == {"running": [], "waiting": 0, "max_waiting": 32}
    assert "zimage_diffusion_waiting" in diffusion.get("/metrics").text
