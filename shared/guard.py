"""Keeps strangers from a service: requests must show the token that the services share, and name a host that the
service is known by."""

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shared.addresses import host_name, is_known_host
from shared.errors import Unauthorized, WrongHost
from shared.problems import problem_response

OPEN_PATHS = ("/health/live", "/health/ready")
"""What orchestrators ask, which tells nothing of the work. Metrics are guarded: Prometheus can send a token."""


class Guard:
    """Refuses requests without the token, before anything of their bodies is read."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self.app = app
        self._expected = f"bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._admits(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        refusal = Unauthorized("This service needs the token that the services share, as a bearer token.")
        await problem_response(refusal, scope.get("request_id"))(scope, receive, send)

    def _admits(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return hmac.compare_digest(f"{scheme.lower()} {token}".encode(), self._expected)


class KnownHosts:
    """Refuses requests for a host of another name, before anything of their bodies is read.

    A web page whose name its owner makes lead to 127.0.0.1 is, to a browser, of one origin with what listens there, and
    may read every answer; the browser still names that page's host.
    """

    def __init__(self, app: ASGIApp, *, patterns: Sequence[str]) -> None:
        self.app = app
        self._patterns = patterns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        if scope["type"] != "http" or is_known_host(host_name(Headers(scope=scope).get("host", "")), self._patterns):
            await self.app(scope, receive, send)
            return
        refusal = WrongHost(
            "This server is not known by the host that the request names. Call it by its address, or add the name to "
            "'server.allowed_hosts' (ZIMAGE_ALLOWED_HOSTS)."
        )
        await problem_response(refusal, scope.get("request_id"))(scope, receive, send)
