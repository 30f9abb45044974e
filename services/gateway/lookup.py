"""Looks host names up: which addresses a service has now. Knows nothing of what is there."""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx2
import structlog

LOOKUP_TIMEOUT_S = 5.0
_THREADS = ThreadPoolExecutor(8, "lookup")  # their own: a lookup may hang, and requests are worked on in the loop's
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Answers the addresses of a host. Raises OSError where there are none."""
log = structlog.get_logger(__name__)


async def resolve(host: str, port: int) -> Sequence[str]:
    """The host's IPv4 addresses; only without any its IPv6 ones, as a machine that has both would count twice.

    Raises OSError.
    """
    ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_THREADS, ask)
    by_family = {family: {str(where[0]) for kind, *_, where in found if kind == family} for family, *_ in found}
    return sorted(by_family.get(socket.AF_INET) or by_family.get(socket.AF_INET6) or ())


class Host:
    """The host of a base URL, and the addresses that it had when it was last looked up."""

    def __init__(self, url: str, resolve: Resolve) -> None:
        self.url = url
        parsed = httpx2.URL(url)
        self._name = parsed.host
        self._port = parsed.port or (443 if parsed.scheme == "https" else 80)
        self._resolve = resolve
        self._pending: asyncio.Task[Sequence[str]] | None = None
        self._failed = False
        self.addresses: tuple[str | None, ...] = (None,)

    @property
    def is_name(self) -> bool:
        """Whether there is something to look up."""
        try:
            ipaddress.ip_address(self._name)
        except ValueError:
            return True
        return False

    async def look_up(self) -> bool:
        """Looks the name up, and says whether the addresses are others than before.

        While nothing can be looked up the last addresses count: whether somebody is there is told by asking there. One
        that takes long goes on; no other begins before it has ended.
        """
        if self._pending is None:
            self._pending = asyncio.create_task(self._ask(), name=f"lookup {self._name}")
        await asyncio.wait((self._pending,), timeout=LOOKUP_TIMEOUT_S)
        if not self._pending.done():
            return False
        found, self._pending = tuple(self._pending.result()), None
        if bool(found) is self._failed:
            self._failed = not found
            log.info("host name", host=self._name, found=list(found))
        before, self.addresses = self.addresses, found or self.addresses
        return self.addresses != before

    def close(self) -> None:
        """Gives up what is being looked up."""
        if self._pending is not None:
            self._pending.cancel()

    async def _ask(self) -> Sequence[str]:
        try:
            return await self._resolve(self._name, self._port)
        except (OSError, UnicodeError):  # the latter for a name that no encoding of host names holds
            return ()
