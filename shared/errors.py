"""One root for every error that a client may see; status, code and title stand on the class.

A service raises these, `shared.problems` writes them as `application/problem+json` (RFC 9457), and `rebuild` makes the
same class again from the code on the other side, so that a 404 of a service is a 404 of the gateway.
"""

from collections.abc import Iterator
from typing import ClassVar


class ServiceError(Exception):
    """Root of the errors whose text is written for clients: `detail` is a sentence that says what to change.

    `told` says that another service answered with it, rather than that something was the matter with that service.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Something went wrong in the server"

    def __init__(self, detail: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.told = False


class MalformedBody(ServiceError):
    """The body could not be parsed at all."""

    status = 400
    code = "malformed_body"
    title = "The request body could not be read"


class Unauthorized(ServiceError):
    """The request lacks the token that the services share, or shows another."""

    status = 401
    code = "unauthorized"
    title = "The token is missing or wrong"


class UnknownName(ServiceError):
    """A template, rewriter, model or path of that name does not exist."""

    status = 404
    code = "not_found"
    title = "No such thing"


class MethodNotAllowed(ServiceError):
    """The path exists, but not for this method."""

    status = 405
    code = "method_not_allowed"
    title = "Method not allowed"


class Cancelled(ServiceError):
    """The request was given up by a DELETE with its id."""

    status = 409
    code = "cancelled"
    title = "The request was cancelled"


class BodyTooLarge(ServiceError):
    """The body, or one part of it, is larger than the service reads."""

    status = 413
    code = "too_large"
    title = "The request body is too large"


class WrongContentType(ServiceError):
    """The body is not of the media type that the endpoint reads."""

    status = 415
    code = "wrong_content_type"
    title = "Wrong content type"


class InvalidField(ServiceError):
    """A field is missing or outside its limits."""

    status = 422
    code = "invalid_field"
    title = "A field is not valid"


class QueueFull(ServiceError):
    """The service has as much work waiting as it takes."""

    status = 429
    code = "queue_full"
    title = "The queue is full"


class WrongHost(ServiceError):
    """The request names a host that this server is not known by."""

    status = 421
    code = "wrong_host"
    title = "The request is meant for another host"


class HeadersTooLarge(ServiceError):
    """The request's headers are larger than a service reads."""

    status = 431
    code = "headers_too_large"
    title = "The request headers are too large"


class ClientGone(ServiceError):
    """The client closed its connection, so that only the log has this answer, or took too long to send its body."""

    status = 499
    code = "client_gone"
    title = "The client went away"


class InternalError(ServiceError):
    """A defect; the cause is in the log under the request id."""


class NumericalError(ServiceError):
    """The model produced values that are not numbers."""

    status = 500
    code = "numerical_error"
    title = "The model produced values that are not numbers"


class BadUpstream(ServiceError):
    """Another service answered something that cannot be understood."""

    status = 502
    code = "bad_upstream"
    title = "Another service gave an answer that cannot be understood"


class Unready(ServiceError):
    """The service is loading, stopping, or lacks a part that it needs."""

    status = 503
    code = "unready"
    title = "Not ready"


class NotBegun(ServiceError):
    """The service ended while the request still waited: nothing was done, another attempt costs nothing."""

    status = 503
    code = "not_begun"
    title = "The service ended before it had begun"


class DeviceFailed(ServiceError):
    """The device failed while it worked on this request; the service starts anew."""

    status = 503
    code = "device_failed"
    title = "The device failed"


class Unreachable(ServiceError):
    """Another service could not be reached."""

    status = 503
    code = "unreachable"
    title = "A service cannot be reached"


class OutOfMemory(ServiceError):
    """The device had too little memory for this request."""

    status = 503
    code = "out_of_memory"
    title = "The device ran out of memory"


class UpstreamTimeout(ServiceError):
    """Another service did not answer within the deadline."""

    status = 504
    code = "upstream_timeout"
    title = "A service did not answer in time"


class StorageFailed(ServiceError):
    """A file could not be written, as the disk is full or broken."""

    status = 507
    code = "storage_failed"
    title = "The disk takes no more"


def _subclasses(root: type[ServiceError]) -> Iterator[type[ServiceError]]:
    for child in root.__subclasses__():
        yield child
        yield from _subclasses(child)


BY_CODE: dict[str, type[ServiceError]] = {
    **{error.code: error for error in _subclasses(ServiceError)},
    InternalError.code: InternalError,
}


def rebuild(code: str, detail: str, *, retry_after_s: int | None = None) -> ServiceError | None:
    """Makes the error that another service raised; None when the code is none of ours."""
    known = BY_CODE.get(code)
    if known is None:
        return None
    error = known(detail, retry_after_s=retry_after_s)
    error.told = True
    return error
