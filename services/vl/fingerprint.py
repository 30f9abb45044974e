"""What tells one vision-language model from another, the same on every machine that has its files. Imports no torch."""

import hashlib
from pathlib import Path

from shared.checkpoint import read_json

SAMPLES, SAMPLE_BYTES = 64, 4096
FILES = ("config.json", "preprocessor_config.json", "tokenizer.json")


def fingerprint_of(folder: Path, options: str) -> str:
    """Sixteen hexadecimal digits of what the directory's models, tokenizer and pictures' processor are.

    Of the weights their lengths and evenly spaced samples are read, headers included: gigabytes in milliseconds.
    `options` are other things that change hidden states.
    """
    digest = hashlib.sha256(options.encode())
    read_json(folder / FILES[0])
    for name in FILES:
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for index in range(SAMPLES):
                file.seek(index * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
