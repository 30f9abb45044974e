"""Tiny checkpoints for tests."""

import contextlib
import io
from pathlib import Path

from safetensors.torch import load_file, save_file

from zimage.checkpoints import make_checkpoint, make_vision_checkpoint


def make_quietly(folder: Path, *, dtype: str) -> Path:
    """A checkpoint with random weights, made without transformers' progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        return make_checkpoint(folder, dtype=dtype)


def make_vision_quietly(folder: Path, *, dtype: str) -> Path:
    """A Qwen3-VL checkpoint with random weights, made as quietly."""
    with contextlib.redirect_stderr(io.StringIO()):
        return make_vision_checkpoint(folder, dtype=dtype)


def forget_weights(folder: Path, part: str) -> None:
    """Takes every tensor whose name has `part` in it out of a folder's weights, which are one file."""
    (path,) = folder.glob("*.safetensors")
    kept = {name: tensor.clone() for name, tensor in load_file(path).items() if part not in name}
    save_file(kept, path, metadata={"format": "pt"})
