"""Looks at a checkpoint directory without loading it: is it usable, and in which dtype are its weights?

Reads JSON and safetensors headers only; imports no torch.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.wire import ITEM_BYTES, Header, WireError, read_file_header

HEAD = "lm_head.weight"
"""What a language model writes with: absent where it is tied to the embeddings, and from models that only read."""
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


class UnusableModel(Exception):
    """The directory cannot be used as the model that is asked for; the text is one sentence for the operator."""


def require_parts(model_path: Path, *parts: str) -> Path:
    """The directory, if it holds every named part (a folder with a configuration). Raises UnusableModel."""
    if not model_path.is_dir():
        raise UnusableModel(f"the model directory {model_path} does not exist: name another with --model-path")
    for part in parts:
        folder = model_path / part
        if not any(folder.glob("*.json")):
            raise UnusableModel(
                f"{model_path} is not a Z-Image model: its folder '{part}' is missing or has no configuration"
            )
    return model_path


def require_weights(folder: Path) -> None:
    """Checks that every weight file is there and readable safetensors, and that there is one. Raises UnusableModel."""
    if not list(weight_headers(folder)):
        raise UnusableModel(f"{folder} holds no .safetensors weights; pickled weights (.bin, .pt) are never loaded")
    for index in sorted(folder.glob("*.safetensors.index.json")):  # names for each tensor its file
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, Mapping):
            raise UnusableModel(f"{index} does not say which file holds which weights")
        missing = sorted({str(name) for name in shards.values() if not (folder / str(name)).is_file()})
        if missing:
            raise UnusableModel(f"{folder} is not complete: {', '.join(missing)} is missing")


def require_every_weight(folder: Path, missing: Iterable[str]) -> None:
    """Raises UnusableModel where loading a folder found no weights under the names `missing`: libraries fill in random
    ones."""
    names = sorted(missing)
    if names:
        raise UnusableModel(f"{folder} is not complete: it lacks {names[0]}, one of {len(names)} weights that it needs")


def weight_headers(folder: Path) -> Iterator[Header]:
    """The headers of a folder's safetensors files, in the order of their names. Raises UnusableModel."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                yield read_file_header(file)
        except (WireError, OSError) as error:
            raise UnusableModel(f"{path} cannot be read as safetensors: {error}") from None


def checkpoint_dtype(folder: Path) -> str:
    """The dtype, as torch spells it, that most of a folder's numbers are stored in."""
    count: Counter[str] = Counter()
    for header in weight_headers(folder):
        for tensor in header.tensors:
            if tensor.dtype in _FLOATS:
                count[_FLOATS[tensor.dtype]] += tensor.nbytes
    return count.most_common(1)[0][0] if count else "float32"


def weight_bytes(folder: Path, float_bytes: int) -> int:
    """Bytes of a folder's weights once loaded, a floating-point number in `float_bytes`. Raises UnusableModel."""
    tensors = [tensor for header in weight_headers(folder) for tensor in header.tensors]
    return sum(
        tensor.nbytes // ITEM_BYTES[tensor.dtype] * float_bytes if tensor.dtype in _FLOATS else tensor.nbytes
        for tensor in tensors
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the checkpoint. Raises UnusableModel when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UnusableModel(f"{path} is missing or is not JSON") from None
    if not isinstance(value, dict):
        raise UnusableModel(f"{path} does not hold a JSON object")
    return value
