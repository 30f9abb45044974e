"""Secrets that are shown in a header: the token that services share, how it is read from a file, and the key of an
API. The text of neither is in any message."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, SecretStr
from pydantic_core import PydanticCustomError

_FORM = re.compile(r"[!-~]{8,512}")
_KEY_FORM = re.compile(r"[!-~]{1,8192}")


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


def _stripped(value: Any) -> Any:
    return (value.strip() or None) if isinstance(value, str) else value


def _of_a_header(key: SecretStr | None) -> SecretStr | None:
    if key is not None and not _KEY_FORM.fullmatch(key.get_secret_value()):
        raise PydanticCustomError(
            "zimage_key", "a key must be printable ASCII characters without spaces, 8192 of them at most"
        )
    return key


ApiKey = Annotated[SecretStr | None, BeforeValidator(_stripped), AfterValidator(_of_a_header)]
"""A key that another server asks for, as it stands in a header; white space around it is none of it."""
