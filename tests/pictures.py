"""Pictures for tests: good ones of every kind, and broken ones without number."""

import io
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")


def pixels(width: int = 96, height: int = 64, *, seed: int = 0) -> Image.Image:
    """A colourful picture, the same for the same arguments."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image | None = None, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture."""
    target = io.BytesIO()
    (pixels() if picture is None else picture).save(target, kind, **options)
    return target.getvalue()


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A PNG of some hundred bytes that claims to be huge; its checksum is right."""
    data = encoded(pixels(8, 8))
    header = data[12:16] + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def scans(more: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more: each is decoded over the whole picture."""
    data = encoded(pixels().convert("L"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * more + data[-2:]


def malformed(count: int, seed: int = 0) -> Iterator[bytes]:
    """Truncated, mutated and spliced pictures, bombs, and what is no picture at all. A few of them may be readable."""
    rng = random.Random(seed)
    good = [encoded(pixels(64, 48, seed=index), kind) for index in range(3) for kind in FORMATS]
    exif = Image.Exif()
    exif[0x0112] = 6
    good += [encoded(kind=kind, exif=exif) for kind in FORMATS]
    makers = (_truncated, _mutated, _mutated, _spliced, _lengthened, _bomb, _other)
    for index in range(count):
        yield makers[index % len(makers)](rng, rng.choice(good))


def _truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _mutated(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 64))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _spliced(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.choice((1, 16, 1000))) + data[min(len(data), start + rng.randrange(99)) :]


def _lengthened(rng: random.Random, data: bytes) -> bytes:
    """A field that says how much follows says too much."""
    place = rng.randrange(max(1, len(data) - 4))
    return data[:place] + rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4)) + data[place + 4 :]


def _bomb(rng: random.Random, _: bytes) -> bytes:
    if rng.random() < 0.25:
        return scans(rng.choice((101, 2000)))
    return bomb(rng.choice((50_000, 2**31 - 1, 1, 9_999)), rng.choice((50_000, 2**31 - 1, 60_000)))


def _other(rng: random.Random, data: bytes) -> bytes:
    return rng.choice(
        (
            b"",
            b"GIF89a" + data,
            b"%PDF-1.7\n",
            b"RIFF\xff\xff\xff\xffWEBP",
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            rng.randbytes(rng.randrange(1, 5000)),
            b"\x89PNG\r\n\x1a\n" + rng.randbytes(200),
            b"\xff\xd8\xff\xe0" + rng.randbytes(200),
        )
    )
