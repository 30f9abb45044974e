"""The token that services share: its form, and how it is read from a file. Its text is in no message."""

import re
from pathlib import Path

_FORM = re.compile(r"[!-~]{8,512}")


class BadToken(Exception):
    """The token cannot be used; the text says where it stands and what is the matter."""


def checked_token(token: str, where: str) -> str:
    """The token, if it can stand in a header. Raises BadToken."""
    if not _FORM.fullmatch(token):
        raise BadToken(f"the token of {where} must be 8 to 512 printable ASCII characters without spaces")
    return token


def read_token(path: Path) -> str:
    """The token that a file holds, with or without a line break at its end. Raises BadToken."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise BadToken(f"the file of the token, {path}, cannot be read") from None
    return checked_token(text, str(path))
