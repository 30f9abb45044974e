"""PNG encoding. A pure leaf: pixels in, bytes out; releases the interpreter's lock while it compresses."""

import io
from typing import Any

from PIL import Image


def encode_png(pixels: Any, *, compression: int) -> bytes:
    """The PNG of a numpy array uint8 [height, width, 3]; `compression` is zlib's level, 0 to 9."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=compression)
    return buffer.getvalue()
