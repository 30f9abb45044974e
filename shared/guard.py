"""Keeps strangers from a service: requests must show the token that the services share."""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shared.errors import Unauthorized
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
