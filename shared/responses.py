"""A response in pieces of known length, sent as they are."""

from collections.abc import Mapping, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class ChunkedResponse(Response):
    """Sends buffers one after the other under one Content-Length, so that tensors are never joined with a header."""

    def __init__(
        self, chunks: Sequence[bytes | memoryview], *, media_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.chunks = chunks
        length = {"content-length": str(sum(len(chunk) for chunk in chunks))}
        super().__init__(None, media_type=media_type, headers={**(headers or {}), **length})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Sends the response."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
