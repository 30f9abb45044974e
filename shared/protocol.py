"""The protocol below the app: uvicorn's, which by itself would read a request's head without end.

A head that is within these bounds and yet larger than a service takes is refused by `shared.requests`.
"""

import asyncio
import uuid

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from shared.errors import HeadersTooLarge, MalformedBody, ServiceError
from shared.problems import problem_response

MAX_BYTES_BEYOND_BODY = 4 << 20  # request line, headers, the marks of a body's chunks, trailers
HEAD_TIMEOUT_S = 60.0
UNREAD_TIMEOUT_S = 60.0
"""A client that takes nothing of its answer for so long counts as gone, and what is held for it is let go."""

log = structlog.get_logger(__name__)


class BoundedProtocol(HttpToolsProtocol):
    """One connection. What it cannot hand to the app as a request it refuses itself, as a problem, and closes."""

    _beyond_body = 0
    _deadline: asyncio.TimerHandle | None = None
    _unread_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """A client has connected: the first head must come in time."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed, by whichever side."""
        self._stop_waiting()
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More of an answer waits to be sent than is good: the client must take of it in time."""
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has taken enough of what waited."""
        self._stop_watching()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parses what came; refuses a request that has more around its body than any good one."""
        self._beyond_body += len(data)
        super().data_received(data)
        if self._beyond_body > MAX_BYTES_BEYOND_BODY:
            self._refuse(HeadersTooLarge(f"The request headers are larger than {MAX_BYTES_BEYOND_BODY} bytes."))

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """The head is there; the body has a deadline of its own."""
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body, which the app bounds."""
        self._beyond_body -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The last byte of a request."""
        self._beyond_body = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's text, which is no problem's detail
        """What came is no HTTP."""
        self._refuse(MalformedBody("The request is not well-formed HTTP."))

    def _await_head(self) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:  # an answer is still on its way to this client
            self._await_head()

    def _watch(self, unread: int) -> None:
        self._stop_watching()
        self._unread_deadline = self.loop.call_later(UNREAD_TIMEOUT_S, self._judge_reading, unread)

    def _stop_watching(self) -> None:
        if self._unread_deadline is not None:
            self._unread_deadline.cancel()

    def _judge_reading(self, unread: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left < unread:
            self._watch(left)
            return
        log.info("a client takes nothing of its answer", unread_bytes=left)
        self.transport.abort()

    def _refuse(self, error: ServiceError) -> None:
        if not self.transport.is_closing() and not self._is_answering():
            self._answer(error)
        self.transport.close()

    def _is_answering(self) -> bool:
        """A refusal in the middle of an answer would be taken for a part of it."""
        return self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete

    def _answer(self, error: ServiceError) -> None:
        request_id = uuid.uuid4().hex
        log.info("a request was refused before it was complete", status=error.status, request_id=request_id)
        answer = problem_response(error, request_id)
        headers = [*answer.raw_headers, (b"connection", b"close")]
        lines = [STATUS_LINE[error.status], *(b"%s: %s\r\n" % header for header in headers), b"\r\n"]
        self.transport.write(b"".join(lines) + bytes(answer.body))
