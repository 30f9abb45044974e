"""Bytes of foreign origin to pixels: judged by their header, decoded, turned upright, made opaque. A pure leaf."""

import io
import warnings
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps

from shared.errors import InvalidField
from shared.pictures import check_picture

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PICTURE_PIXELS = 50_000_000
MAX_RATIO = 200  # of the sides: what the processor of Qwen2-VL and Qwen3-VL takes
_BROKEN = "'image' is a broken picture: it cannot be decoded."


def read_picture(data: bytes) -> Image.Image:
    """The first picture of a PNG, JPEG or WEBP as mode RGB: EXIF orientation applied, transparent parts on white.

    Raises InvalidField and BodyTooLarge; a picture with too many pixels is refused before it is decoded.
    """
    check_picture(data, "image")
    picture = _opened(data)
    width, height = picture.size
    if width * height > MAX_PICTURE_PIXELS:
        raise InvalidField(f"'image' may have at most {MAX_PICTURE_PIXELS} pixels, not {width} x {height}.")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InvalidField(f"'image' is {width} x {height}: one side may be at most {MAX_RATIO} times the other.")
    try:
        picture.load()
        with suppress(Exception):  # orientation that cannot be read is no orientation
            picture = ImageOps.exif_transpose(picture)
        return _opaque(picture)
    except Exception:  # noqa: BLE001 - a decoder of foreign bytes may raise anything: the picture is broken
        raise InvalidField(_BROKEN) from None


def _opened(data: bytes) -> Image.Image:
    """The picture with its header read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise InvalidField(f"'image' may have at most {MAX_PICTURE_PIXELS} pixels.") from None
    except Exception:  # noqa: BLE001 - a decoder of foreign bytes may raise anything: the picture is broken
        raise InvalidField(_BROKEN) from None


def _opaque(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off instead of scaling
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")
