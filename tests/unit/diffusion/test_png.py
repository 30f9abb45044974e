"""`services.diffusion.png`: no pixel is lost."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from services.diffusion.png import THUMBNAIL_PX, encode_png, encode_thumbnail


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.integers(0, 99))
def test_round_trip(height: int, width: int, compression: int, seed: int) -> None:
    pixels = noise(height, width, seed)
    png = encode_png(pixels, compression=compression)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (width, height))
        assert np.array_equal(np.asarray(image), pixels)


def test_more_compression_makes_it_smaller() -> None:
    flat = np.full((64, 64, 3), 7, dtype=np.uint8)
    sizes = [len(encode_png(flat, compression=level)) for level in (0, 1, 9)]
    assert sizes[0] > 64 * 64 * 3 > sizes[1] >= sizes[2]


def test_the_same_pixels_make_the_same_bytes() -> None:
    assert encode_png(noise(16, 16), compression=1) == encode_png(noise(16, 16), compression=1)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (THUMBNAIL_PX, THUMBNAIL_PX)),
        ((512, 1024), (THUMBNAIL_PX // 2, THUMBNAIL_PX)),
        ((2048, 16), (THUMBNAIL_PX, 2)),
        ((64, 96), (64, 96)),
    ],
)
def test_thumbnails_keep_the_shape_and_are_never_larger(size: tuple[int, int], expected: tuple[int, int]) -> None:
    with Image.open(io.BytesIO(encode_thumbnail(noise(*size)))) as image:
        assert image.format == "JPEG"
        height, width = expected
        assert abs(image.width - width) <= 1
        assert abs(image.height - height) <= 1


def test_a_thumbnail_looks_like_its_picture() -> None:
    pixels = np.zeros((400, 400, 3), dtype=np.uint8)
    pixels[:, 200:] = (250, 10, 10)
    with Image.open(io.BytesIO(encode_thumbnail(pixels))) as image:
        small = np.asarray(image).astype(int)
    assert small[:, :80].max() < 30
    assert abs(small[:, 110:] - (250, 10, 10)).max() < 30
