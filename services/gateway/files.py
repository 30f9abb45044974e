"""Embeddings as safetensors files. The tensor's bytes are written as they came."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from services.gateway.clients import Embeddings
from shared.errors import StorageFailed
from shared.wire import TensorMeta, build_header

TENSOR = "embeddings"
LEAST_FREE_BYTES = 256 << 20  # of the disk, which the history may share: files of embeddings leave it so much


def write_embeddings(folder: Path, embeddings: Embeddings, metadata: Mapping[str, str]) -> Path:
    """Writes the tensor `embeddings` [tokens, width] and answers the file's path, named after what it holds.

    The file appears whole or not at all and is on disk when this returns. Raises StorageFailed.
    """
    header = build_header([TensorMeta(TENSOR, embeddings.dtype, embeddings.shape)], metadata)
    name = hashlib.sha256(header)
    name.update(embeddings.data)
    path = folder / f"embeddings_{name.hexdigest()[:12]}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < LEAST_FREE_BYTES + len(embeddings.data):
            raise StorageFailed("The embeddings were not saved: the disk of the data directory is nearly full.")
        _write_whole(path, header, embeddings.data)
    except OSError as error:
        raise StorageFailed(f"The embeddings could not be saved: {error.strerror or 'the disk failed'}.") from error
    return path


def _write_whole(path: Path, *parts: bytes | memoryview) -> None:
    file = tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False)  # noqa: SIM115 - closed below
    try:
        with file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(path)
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name as well outlives a power cut
    finally:
        os.close(folder)
