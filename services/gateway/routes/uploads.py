"""Pictures in the bodies of requests: as base64 in JSON, or as a file of a form."""

import asyncio
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from shared.errors import InvalidField, MalformedBody
from shared.pictures import check_picture, decode_picture
from shared.problems import from_validation
from shared.requests import require_json
from shared.schemas.vl import ExtractOptions, ExtractRequest

FORM = "multipart/form-data"
MAX_FIELDS = 8
MAX_FIELD_BYTES = 1 << 18
_FALLBACK = "The form could not be read: send a file 'image', and other fields as text."

M = TypeVar("M", bound=BaseModel)


async def read_extraction(request: Request) -> tuple[bytes, ExtractOptions]:
    """The picture and the options of `POST /api/vl/extract`. Raises InvalidField, MalformedBody, BodyTooLarge,
    WrongContentType."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == FORM:
        return await _read_form(request)
    await require_json(request)
    body = await request.body()
    return await asyncio.to_thread(_read_json, body)


def _read_json(body: bytes) -> tuple[bytes, ExtractOptions]:
    wanted = _validated(ExtractRequest, body)
    return decode_picture(wanted.image, "image"), wanted


async def _read_form(request: Request) -> tuple[bytes, ExtractOptions]:
    try:
        form = await request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except HTTPException as error:
        if error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            raise
        raise MalformedBody(_FALLBACK) from None
    upload = form.get("image")
    if not isinstance(upload, UploadFile):
        raise InvalidField("'image' is required: a file of the form.")
    picture = check_picture(await upload.read(), "image")
    fields = {name: value for name, value in form.multi_items() if isinstance(value, str) and value}
    return picture, _validated(ExtractOptions, fields)


def _validated(kind: type[M], given: bytes | dict[str, Any]) -> M:
    """JSON strictly; the fields of a form, which are all text, as what they look like."""
    try:
        if isinstance(given, bytes):
            return kind.model_validate_json(given)
        return kind.model_validate(given, strict=False)
    except ValidationError as error:
        raise from_validation([{**item, "loc": ("body", *item["loc"])} for item in error.errors()]) from None
