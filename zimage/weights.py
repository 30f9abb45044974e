"""Looks at the weights of one folder of a model without loading them: how much there is, and whether it is whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.checkpoint import UnusableModel, checkpoint_dtype, read_json, require_weights, weight_headers


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What a folder's safetensors files hold; `dtype` is what most numbers are stored in, as torch spells it."""

    files: int
    stored_bytes: int
    dtype: str


def read_weights(folder: Path) -> Weights:
    """The weights of a folder. Raises UnusableModel when they are missing, broken or not all there."""
    require_weights(folder)
    _require_every_shard(folder)
    headers = list(weight_headers(folder))
    return Weights(
        files=len(headers),
        stored_bytes=sum(tensor.nbytes for header in headers for tensor in header.tensors),
        dtype=checkpoint_dtype(folder),
    )


def _require_every_shard(folder: Path) -> None:
    """Weights in several files have an index, which names for each tensor its file."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, Mapping):
            raise UnusableModel(f"{index} does not say which file holds which weights")
        missing = sorted({str(name) for name in shards.values() if not (folder / str(name)).is_file()})
        if missing:
            raise UnusableModel(f"{folder} is not complete: {', '.join(missing)} is missing")
