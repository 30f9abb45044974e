"""The refusals that Swagger shows for routes that take a body and call other services."""

from shared.errors import (
    BadUpstream,
    BodyTooLarge,
    Cancelled,
    ClientGone,
    DeviceFailed,
    HeadersTooLarge,
    InternalError,
    InvalidField,
    MalformedBody,
    NotBegun,
    NumericalError,
    OutOfMemory,
    QueueFull,
    StorageFailed,
    UnknownName,
    Unreachable,
    Unready,
    UpstreamTimeout,
    WrongContentType,
    WrongHost,
)
from shared.problems import responses

ALWAYS = (WrongHost, HeadersTooLarge, InternalError)
BODY = (MalformedBody, UnknownName, BodyTooLarge, WrongContentType, InvalidField, *ALWAYS)
UPSTREAM = (QueueFull, ClientGone, BadUpstream, Unready, Unreachable, UpstreamTimeout)

LIST = responses(*ALWAYS)
FORMAT = responses(*BODY, BadUpstream, Unready, Unreachable, UpstreamTimeout)
ENCODE = responses(*BODY, *UPSTREAM, OutOfMemory)
SAVE = responses(*BODY, *UPSTREAM, OutOfMemory, StorageFailed)
GENERATE = responses(*BODY, Cancelled, *UPSTREAM, NumericalError, OutOfMemory, NotBegun, DeviceFailed)
CANCEL = responses(UnknownName, InvalidField, *ALWAYS, BadUpstream, Unready, Unreachable, UpstreamTimeout)
LORAS = responses(*ALWAYS, BadUpstream, Unready, Unreachable, UpstreamTimeout)
VL_EXTRACT = responses(*BODY, *UPSTREAM, NumericalError, OutOfMemory, StorageFailed)
VL_CACHE = responses(UnknownName, InvalidField, *ALWAYS, Unready, Unreachable)
REWRITE = responses(*BODY, *UPSTREAM, NumericalError, OutOfMemory)
