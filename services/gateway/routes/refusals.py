"""The refusals that Swagger shows for routes that take a body and call other services."""

from shared.errors import (
    BadUpstream,
    BodyTooLarge,
    ClientGone,
    HeadersTooLarge,
    InternalError,
    InvalidField,
    MalformedBody,
    NumericalError,
    OutOfMemory,
    QueueFull,
    UnknownName,
    Unreachable,
    Unready,
    UpstreamTimeout,
    WrongContentType,
)
from shared.problems import responses

BODY = (MalformedBody, UnknownName, BodyTooLarge, WrongContentType, InvalidField, HeadersTooLarge, InternalError)
UPSTREAM = (QueueFull, ClientGone, BadUpstream, Unready, Unreachable, UpstreamTimeout)

LIST = responses(HeadersTooLarge, InternalError)
FORMAT = responses(*BODY, BadUpstream, Unready, Unreachable, UpstreamTimeout)
ENCODE = responses(*BODY, *UPSTREAM, OutOfMemory)
GENERATE = responses(*BODY, *UPSTREAM, NumericalError, OutOfMemory)
