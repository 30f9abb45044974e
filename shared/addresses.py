"""Where services are: lists of base URLs as settings hold them, how they are shown, which addresses only this machine
reaches, and which names of hosts are a server's own."""

import ipaddress
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, AnyHttpUrl, BeforeValidator, Field, UrlConstraints
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

MAX_URLS = 64
ANY_HOST, MAX_PATTERNS = "*", 64
NAMES_OF_NETWORKS = ("localhost", "local", "internal", "home.arpa")
"""What names end with that nobody can register: they lead where this machine's own network says."""
_HOST_PATTERN = re.compile(r"\*|(\*\.)?[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63}){0,30}")
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


def _host_pattern(text: str) -> str:
    if not _HOST_PATTERN.fullmatch(text):
        raise PydanticCustomError("zimage_host", "this is no name of a host: write example.com, *.example.com or *")
    return text.lower()


ServiceUrl = Annotated[AnyHttpUrl, UrlConstraints(allowed_schemes=["http", "https"])]
ServiceUrls = Annotated[tuple[ServiceUrl, ...], NoDecode, BeforeValidator(_split_urls), Field(max_length=MAX_URLS)]
"""Base URLs of the nodes of a service: a list, or a text with commas between them."""


HostPatterns = Annotated[
    tuple[Annotated[str, AfterValidator(_host_pattern)], ...],
    NoDecode,
    BeforeValidator(split_list),
    Field(max_length=MAX_PATTERNS),
]
"""Names of hosts: a list, or a text with commas between them; `*.example.com` is all within a domain, `*` is all."""


def without_passwords(text: str) -> str:
    """The text as people may see it: with `***` in place of the password of each URL in it."""
    return _PASSWORD.sub(r"\1:***@", text)


def without_version(url: str) -> str:
    """The base URL of a server whose paths begin with `/v1`, which people give with it or without."""
    return url.rstrip("/").removesuffix("/v1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on the address."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def host_name(authority: str) -> str:
    """The host of a `Host` header, in small letters: without the port, the dot at its end and an address's brackets."""
    name = authority.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].removesuffix(".")


def is_known_host(name: str, patterns: Sequence[str]) -> bool:
    """Whether a host's name is one of the patterns, or one that no stranger can make lead here: an address, a name
    without a dot, or one of this machine's own network."""
    if "." not in name or name.endswith(tuple(f".{end}" for end in NAMES_OF_NETWORKS)) or _address(name):
        return True
    return any(
        pattern in (ANY_HOST, name) or (pattern.startswith("*.") and name.endswith(pattern[1:])) for pattern in patterns
    )


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
