"""A client of a running Z-Image server: asks for one picture, or says in one sentence why there is none.

It knows no terminal: `zimage generate` and `zimage demo` show what it does.
"""

import asyncio
import base64
import json
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from shared.addresses import is_loopback
from shared.events import ERROR
from shared.events import MEDIA_TYPE as EVENTS
from shared.pictures import PNG_SIGNATURE
from shared.schemas.diffusion import DONE, STEP, Done, Stepped
from zimage.errors import CommandFailed

CONNECT_TIMEOUT_S = 10.0
MAX_EVENT_BYTES = 64 << 20  # the last one holds the PNG in base64
_STRANGE = "{} answered, but not with a picture: is it a Z-Image server?"
_IHDR = struct.Struct(">8x4x4xII")  # signature, length and name of the first chunk, width, height


class NoPicture(CommandFailed):
    """No picture came, or it could not be kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture as the server sent it: `seconds` from the request to its last byte, `server_timing` in milliseconds."""

    png: bytes
    seed: str
    seconds: float
    server_timing: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        width, height = _IHDR.unpack_from(self.png)
        return width, height


async def request_picture(
    url: str, fields: Mapping[str, Any], *, timeout_s: float, told: Callable[[Stepped], None] = lambda _: None
) -> Picture:
    """Asks the server at `url` for the picture that `fields` of `POST /api/generate` describe. Raises NoPicture.

    The server checks the fields: what it refuses comes back in its words. `told` hears of every step as it is done.
    Cancelling closes the connection, which stops the server's work on the picture.
    """
    base = _base_url(url)
    started = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s), _http(base) as http:
            png, answered = await _answer(http, base, fields, told)
    except TimeoutError:
        raise NoPicture(f"no picture came from {base} within {timeout_s:g} s: give it longer with --timeout") from None
    except (httpx2.ConnectError, httpx2.ConnectTimeout):
        raise NoPicture(
            f"no server answers at {base}: start one with `zimage serve --model-path FOLDER`, or name one with --url"
        ) from None
    except httpx2.TransportError:
        raise NoPicture(f"the server at {base} closed the connection before the picture was done") from None
    seconds = time.perf_counter() - started
    if not png.startswith(PNG_SIGNATURE) or len(png) < _IHDR.size:
        raise NoPicture(_STRANGE.format(base))
    return Picture(
        png=png,
        seed=answered.get("x-seed", "unknown"),
        seconds=seconds,
        server_timing=answered.get("server-timing", ""),
    )


async def _answer(
    http: httpx2.AsyncClient, base: str, fields: Mapping[str, Any], told: Callable[[Stepped], None]
) -> tuple[bytes, Mapping[str, str]]:
    """The picture and its headers, as a stream of events from servers that have one."""
    headers = {"content-type": "application/json", "accept": f"{EVENTS}, image/png"}
    async with http.stream("POST", "/api/generate", content=json.dumps(fields), headers=headers) as response:
        if not response.is_success:
            await response.aread()
            raise NoPicture(_refusal(response, base))
        if response.headers.get("content-type", "").startswith(EVENTS):
            return await _last_event(response, base, told)
        return await response.aread(), response.headers


async def _last_event(
    response: httpx2.Response, base: str, told: Callable[[Stepped], None]
) -> tuple[bytes, httpx2.Headers]:
    """The PNG and its headers, at the end of the events of a picture."""
    try:
        async for event in httpx2.EventSource(response, max_event_size=MAX_EVENT_BYTES):
            if event.event == STEP:
                told(Stepped.model_validate_json(event.data))
            elif event.event == ERROR:
                raise NoPicture(str(json.loads(event.data)["detail"]))
            elif event.event == DONE:
                done = Done.model_validate_json(event.data)
                return base64.b64decode(done.image_b64, validate=True), httpx2.Headers(done.headers)
    except (ValueError, KeyError, TypeError):  # ValidationError and binascii.Error are ValueErrors
        raise NoPicture(_STRANGE.format(base)) from None
    raise NoPicture(f"the server at {base} closed the connection before the picture was done")


def _base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise NoPicture(f"'{url}' is not the address of a server, which is written like http://127.0.0.1:7860")
    return url.rstrip("/")


def _http(base: str) -> httpx2.AsyncClient:
    timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S)  # the deadline of the whole is the caller's
    here = is_loopback(urlsplit(base).hostname or "")  # where the proxies that the environment may name don't reach
    return httpx2.AsyncClient(base_url=base, timeout=timeout, trust_env=not here)


def _refusal(response: httpx2.Response, base: str) -> str:
    """The sentence of a refusal that is a problem (RFC 9457), or one that says that it is none."""
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = None
    if not isinstance(detail, str) or not detail:
        return f"{base} answered with status {response.status_code}, as no Z-Image server does: check --url"
    retry_after = response.headers.get("retry-after", "")
    return f"{detail} Try again in {retry_after} s." if retry_after.isdigit() else detail
