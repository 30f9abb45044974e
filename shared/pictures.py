"""Pictures as clients send them, before anybody decodes them: how large, of which kind. No library of pictures here."""

import base64
import re

from shared.errors import BodyTooLarge, InvalidField

MAX_PICTURE_BYTES = 20_000_000
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,32};base64,", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def decode_picture(text: str, field: str) -> bytes:
    """The bytes of a picture in base64, or in a data URL. Raises InvalidField and BodyTooLarge.

    Nothing is ever fetched: another URL is refused.
    """
    head = _DATA_URL.match(text[:64])
    if head is None and _URL.match(text[:64]):
        raise InvalidField(f"'{field}' must be the picture itself in base64: this server fetches no URLs.")
    start = head.end() if head else 0
    if (len(text) - start) // 4 * 3 > MAX_PICTURE_BYTES + 2:
        raise _too_large(field)
    try:
        data = base64.b64decode(text[start:] if start else text, validate=True)
    except ValueError:  # binascii.Error is one; so is what text beyond ASCII raises
        raise InvalidField(f"'{field}' is not base64.") from None
    return check_picture(data, field)


def check_picture(data: bytes, field: str) -> bytes:
    """The same bytes, if they begin as a PNG, JPEG or WEBP does. Raises InvalidField and BodyTooLarge."""
    if len(data) > MAX_PICTURE_BYTES:
        raise _too_large(field)
    if not _is_known(data):
        raise InvalidField(f"'{field}' is no PNG, JPEG or WEBP.")
    return data


def _is_known(data: bytes) -> bool:
    if data.startswith((PNG_SIGNATURE, b"\xff\xd8\xff")):
        return True
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _too_large(field: str) -> BodyTooLarge:
    return BodyTooLarge(f"'{field}' may have at most {MAX_PICTURE_BYTES} bytes.")
