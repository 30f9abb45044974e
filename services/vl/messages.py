"""Reads a request off the wire: one safetensors message with the picture's bytes, the parameters in its metadata."""

from collections.abc import AsyncIterator
from typing import TypeVar

from pydantic import ValidationError

from shared.errors import BodyTooLarge, InvalidField, MalformedBody
from shared.pictures import MAX_PICTURE_BYTES
from shared.problems import from_validation
from shared.schemas.fields import RequestModel
from shared.schemas.vl import IMAGE, PARAMETERS
from shared.wire import Header, WireError, parse_header

P = TypeVar("P", bound=RequestModel)


async def read_message(body: AsyncIterator[bytes], kind: type[P]) -> tuple[bytes, P]:
    """The picture's bytes, undecoded, and the parameters. Raises InvalidField, MalformedBody, BodyTooLarge."""
    message = bytearray()
    async for piece in body:  # the service's own limit on bodies bounds it
        message += piece
    try:
        header = parse_header(message)
    except WireError as error:
        raise InvalidField(f"The safetensors body cannot be used: {error}.") from None
    if len(message) != header.total_bytes:
        raise InvalidField("The safetensors body is shorter or longer than its header says.")
    parameters = _parameters(header, kind)
    meta = header.tensor(IMAGE)
    if meta is None or meta.dtype != "U8" or len(meta.shape) != 1:
        raise InvalidField(f"The tensor '{IMAGE}' is required: the bytes of the picture, U8 of rank 1.")
    if meta.nbytes > MAX_PICTURE_BYTES:
        raise BodyTooLarge(f"'{IMAGE}' may have at most {MAX_PICTURE_BYTES} bytes.")
    return bytes(memoryview(message)[header.span(IMAGE)]), parameters


def _parameters(header: Header, kind: type[P]) -> P:
    text = header.metadata.get(PARAMETERS)
    if text is None:
        raise InvalidField(f"The metadata entry '{PARAMETERS}' is required.")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        errors = [{**item, "loc": (PARAMETERS, *item["loc"])} for item in error.errors()]
        if errors[0]["type"] in ("json_invalid", "string_unicode"):
            raise MalformedBody(f"The metadata entry '{PARAMETERS}' is not JSON.") from None
        raise from_validation(errors) from None
