"""Bodies of the diffusion service's `/v1/generate`, good ones and such as only a broken client sends."""

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from shared.schemas.diffusion import PARAMETERS
from shared.wire import MEDIA_TYPE, TensorMeta, build_header

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
METADATA = {"__metadata__": {PARAMETERS: json.dumps(WANTED)}}
ROWS = {"dtype": "F32", "shape": [1, WIDTH], "data_offsets": [0, 4 * WIDTH]}
_NAMES = {"float32": "F32", "float16": "F16", "int8": "I8", "float64": "F64"}


def message(parameters: Mapping[str, Any] | str | None = None, **tensors: Any) -> bytes:
    """A request's body; `parameters` are merged into `WANTED`, or stand as they are when they are a text."""
    metas = [TensorMeta(name, _NAMES[str(item.dtype)], item.shape) for name, item in tensors.items()]
    text = parameters if isinstance(parameters, str) else json.dumps(WANTED | dict(parameters or {}))
    return build_header(metas, {PARAMETERS: text}) + b"".join(item.tobytes() for item in tensors.values())


def announced(*shape: int) -> bytes:
    """The header alone of a body with a float32 tensor of this shape."""
    return build_header([TensorMeta("text", "F32", shape)], {PARAMETERS: json.dumps(WANTED)})


def states(*shape: int, dtype: str = "float32") -> Any:
    """Numbers that could be hidden states."""
    return np.random.default_rng(0).standard_normal(shape or (10, WIDTH)).astype(dtype)


def states_with(value: float) -> Any:
    """Hidden states of which one number is this."""
    broken = states()
    broken[3, 5] = value
    return broken


def with_header(header: Any, data: bytes = b"") -> bytes:
    """A body with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = message(text=states())
