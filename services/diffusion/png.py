"""Encoding of pictures. A pure leaf: pixels in, bytes out; releases the interpreter's lock while it compresses."""

import io
from typing import Any

from PIL import Image

THUMBNAIL_PX = 192  # longest side
THUMBNAIL_QUALITY = 80


def encode_png(pixels: Any, *, compression: int) -> bytes:
    """The PNG of a numpy array uint8 [height, width, 3]; `compression` is zlib's level, 0 to 9."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=compression)
    return buffer.getvalue()


def encode_thumbnail(pixels: Any) -> bytes:
    """A small JPEG of a numpy array uint8 [height, width, 3], at most `THUMBNAIL_PX` a side."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), reducing_gap=2.0)
    return _jpeg(image)


def encode_preview(pixels: Any) -> bytes:
    """A JPEG of a numpy array uint8 [height, width, 3], which is small already."""
    return _jpeg(Image.fromarray(pixels))


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY)
    return buffer.getvalue()
