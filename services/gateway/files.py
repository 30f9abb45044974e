"""Embeddings as safetensors files. The tensor's bytes are written as they came."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from services.gateway.clients import Embeddings
from shared.wire import TensorMeta, build_header

TENSOR = "embeddings"


def write_embeddings(folder: Path, embeddings: Embeddings, metadata: Mapping[str, str]) -> Path:
    """Writes the tensor `embeddings` [tokens, width] and answers the file's path, named after what it holds.

    The file appears whole or not at all and is on disk when this returns.
    """
    header = build_header([TensorMeta(TENSOR, embeddings.dtype, embeddings.shape)], metadata)
    name = hashlib.sha256(header)
    name.update(embeddings.data)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"embeddings_{name.hexdigest()[:12]}.safetensors"
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
        file.write(header)
        file.write(embeddings.data)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)
    return path
