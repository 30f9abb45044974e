"""Looks at the weights of one folder of a model without loading them: how much there is, and whether it is whole."""

from dataclasses import dataclass
from pathlib import Path

from shared.checkpoint import checkpoint_dtype, require_weights, weight_headers


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What a folder's safetensors files hold; `dtype` is what most numbers are stored in, as torch spells it."""

    files: int
    stored_bytes: int
    dtype: str


def read_weights(folder: Path) -> Weights:
    """The weights of a folder. Raises UnusableModel when they are missing, broken or not all there."""
    require_weights(folder)
    headers = list(weight_headers(folder))
    return Weights(
        files=len(headers),
        stored_bytes=sum(tensor.nbytes for header in headers for tensor in header.tensors),
        dtype=checkpoint_dtype(folder),
    )
