"""What tells one model from another, the same on every machine that has its files. Imports no torch."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

SAMPLES, SAMPLE_BYTES = 64, 4096
FILES = ("config.json", "preprocessor_config.json", "scheduler_config.json", "tokenizer.json")


def fingerprint_of(folders: Iterable[Path], options: str) -> str:
    """Sixteen hexadecimal digits of what the folders' models, tokenizers, schedulers and pictures' processors are.

    Of weights the lengths and evenly spaced samples are read, headers included: gigabytes in milliseconds. `options`
    are other things that change what is computed.
    """
    digest = hashlib.sha256(options.encode())
    for folder in folders:
        for name in FILES:
            path = folder / name
            digest.update(path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.glob("*.safetensors")):
            _sample(digest, path)
    return digest.hexdigest()[:16]


def fingerprint_of_files(files: Iterable[Path]) -> str:
    """The same of single files of weights."""
    digest = hashlib.sha256()
    for path in files:
        _sample(digest, path)
    return digest.hexdigest()[:16]


def _sample(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}\n".encode())
    with path.open("rb") as file:
        for index in range(SAMPLES):
            file.seek(index * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
