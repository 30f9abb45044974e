"""Bytes of foreign origin to pixels: judged by their header, decoded, turned upright, made opaque. A pure leaf."""

import io
import warnings
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps

from shared.errors import InvalidField, OutOfMemory
from shared.pictures import check_picture

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PICTURE_PIXELS = 50_000_000
MAX_SCANS = 100  # of a progressive JPEG, each of which is decoded over the whole picture; encoders write about ten
MAX_RATIO = 200  # of the sides: what the processor of Qwen2-VL and Qwen3-VL takes
_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"
_BROKEN = "'image' is a broken picture: it cannot be decoded."


def read_picture(data: bytes) -> Image.Image:
    """The first picture of a PNG, JPEG or WEBP as mode RGB: EXIF orientation applied, transparent parts on white.

    Raises InvalidField and BodyTooLarge; a picture that would cost too much is refused before it is decoded. Raises
    OutOfMemory where what it costs is not there.
    """
    check_picture(data, "image")
    picture = _opened(data)
    width, height = picture.size
    if width * height > MAX_PICTURE_PIXELS:
        raise InvalidField(f"'image' may have at most {MAX_PICTURE_PIXELS} pixels, not {width} x {height}.")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InvalidField(f"'image' is {width} x {height}: one side may be at most {MAX_RATIO} times the other.")
    if data.startswith(_JPEG) and data.count(_SCAN) > MAX_SCANS:
        raise InvalidField(f"'image' is a JPEG of more than {MAX_SCANS} scans.")
    try:
        picture.load()
        with suppress(Exception):  # orientation that cannot be read is no orientation
            ImageOps.exif_transpose(picture, in_place=True)
        return _opaque(picture)
    except MemoryError:
        raise OutOfMemory("There is too little free memory to decode 'image'.") from None
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
    """The picture as RGB. Each copy of a large one is 200 MB, so there are no more of them than it takes."""
    if picture.mode.startswith("I"):
        picture = _eight_bits(picture)
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    layer = picture if picture.mode == "RGBA" else picture.convert("RGBA")
    ground = Image.new("RGB", layer.size, "white")
    ground.paste(layer, mask=layer.getchannel("A"))
    return ground


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A picture of 16 bits of grey, which Pillow would cut off instead of scaling, and what of it is transparent."""
    levels = np.asarray(picture)
    grey = Image.fromarray((levels >> 8).clip(0, 255).astype(np.uint8))
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    return grey
