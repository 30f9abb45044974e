"""Where services are: lists of base URLs as settings hold them, how they are shown, and which addresses only this
machine reaches."""

import ipaddress
import json
import re
from typing import Annotated, Any

from pydantic import AnyHttpUrl, BeforeValidator, Field, UrlConstraints
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

MAX_URLS = 64
_PASSWORD = re.compile(r"(://[^\s,:@/]*):[^\s,'\"]*@")


def split_list(value: Any) -> Any:
    """The items of a text, which is a JSON list (what the command line passes on) or separated by commas."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text.startswith("["):
        return [item.strip() for item in text.split(",")] if text else []
    try:
        return json.loads(text)
    except ValueError:
        raise PydanticCustomError("zimage_list", "this is neither a JSON list nor items between commas") from None


def _split_urls(value: Any) -> Any:
    items = split_list(value)
    if not isinstance(items, list | tuple):
        return items
    urls = [url for item in items for url in (split_list(item) if isinstance(item, str) else [item])]
    return list(dict.fromkeys(urls))


ServiceUrl = Annotated[AnyHttpUrl, UrlConstraints(allowed_schemes=["http", "https"])]
ServiceUrls = Annotated[tuple[ServiceUrl, ...], NoDecode, BeforeValidator(_split_urls), Field(max_length=MAX_URLS)]
"""Base URLs of the nodes of a service: a list, or a text with commas between them."""


def without_passwords(text: str) -> str:
    """The text as people may see it: with `***` in place of the password of each URL in it."""
    return _PASSWORD.sub(r"\1:***@", text)


def without_version(url: str) -> str:
    """The base URL of a server whose paths begin with `/v1`, which people give with it or without."""
    return url.rstrip("/").removesuffix("/v1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
