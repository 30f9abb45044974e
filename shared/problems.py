"""Errors on the wire: every refusal is `application/problem+json` (RFC 9457) with `detail`, `code` and `request_id`.

No text of a library's exception reaches a client: a failed validation is told in the sentences below, an
unknown error (which `shared.requests` catches) by its request id alone, under which the log has the trace.
"""

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from shared.errors import (
    BY_CODE,
    BodyTooLarge,
    ClientGone,
    InternalError,
    InvalidField,
    MalformedBody,
    MethodNotAllowed,
    ServiceError,
    Unauthorized,
    UnknownName,
)

MEDIA_TYPE = "application/problem+json"
INCOMPLETE = "The connection closed, or the time was up, before the request body was complete."


class Problem(BaseModel):
    """The body of every answer that is not a success."""

    type: str = "about:blank"
    title: str = Field(examples=["A field is not valid"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["'width' must be a multiple of 16."])
    code: str = Field(examples=["invalid_field"])
    request_id: str | None = Field(examples=["3f1c0a5b7d2e4c69"])


def responses(*errors: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of a route that may refuse with these errors, an example each."""
    documented: dict[int | str, dict[str, Any]] = {}
    for error in errors:
        example = {
            "type": "about:blank",
            "title": error.title,
            "status": error.status,
            "detail": (error.__doc__ or error.title).split("\n")[0],
            "code": error.code,
            "request_id": "3f1c0a5b7d2e4c69",
        }
        entry = documented.setdefault(error.status, {"description": error.title, "content": {MEDIA_TYPE: {}}})
        content = entry["content"][MEDIA_TYPE]
        content.setdefault("schema", Problem.model_json_schema())
        content.setdefault("examples", {})[error.code] = {"value": example}
    return documented


def problem_of(error: ServiceError, request_id: str | None) -> Problem:
    """What a client is told of an error."""
    return Problem(title=error.title, status=error.status, detail=error.detail, code=error.code, request_id=request_id)


class OpenAIRoute(APIRoute):
    """A route whose problems have the member `error` besides, where OpenAI's clients look for the sentence."""


def openai_error(problem: Problem) -> dict[str, Any]:
    """The member `error` of an error as OpenAI tells it."""
    return {"message": problem.detail, "type": problem.title, "param": None, "code": problem.code}


def problem_response(error: ServiceError, request_id: str | None, *, route: object = None) -> JSONResponse:
    """The answer for an error of a route."""
    problem = problem_of(error, request_id)
    more = {"error": openai_error(problem)} if isinstance(route, OpenAIRoute) else {}
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({**problem.model_dump(), **more}, error.status, headers=headers, media_type=MEDIA_TYPE)


def install_handlers(app: FastAPI) -> None:
    """Makes the app answer every error as a problem."""

    async def service_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ServiceError)  # noqa: S101 - registered for this class only
        return _response(request, error)

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class only
        answer = _response(request, _from_http(request, error))
        if "allow" in (headers := Headers(error.headers)):
            answer.headers["allow"] = headers["allow"]
        return answer

    async def validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class only
        return _response(request, from_validation(error.errors()))

    app.add_exception_handler(ServiceError, service_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)


def request_id_of(request: Request) -> str | None:
    """The id that `shared.requests.RequestContext` gave this request."""
    return request.scope.get("request_id")


def _response(request: Request, error: ServiceError) -> JSONResponse:
    return problem_response(error, request_id_of(request), route=request.scope.get("route"))


def _from_http(request: Request, error: HTTPException) -> ServiceError:
    method, path = request.method, request.url.path[:200]
    if isinstance(error.__cause__, ClientDisconnect):  # FastAPI takes it for a body that cannot be parsed
        return ClientGone(INCOMPLETE)
    if isinstance(error.__cause__, ServiceError):
        return error.__cause__
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            return UnknownName(f"There is nothing at {path}; /docs lists what there is.")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            return MethodNotAllowed(f"{path} does not answer {method}; /docs lists what it answers.")
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return BodyTooLarge("The request body is larger than this server reads.")
        case HTTPStatus.BAD_REQUEST:
            return MalformedBody("The request body is not well-formed JSON.")
        case status:
            known = next((known for known in BY_CODE.values() if known.status == status), InternalError)
            return known(f"{known.title}.")


_SENTENCES: Mapping[str, str] = {
    "missing": "is required",
    "extra_forbidden": "is not a field of this request",
    "string_type": "must be a string",
    "string_unicode": "must not contain half of a surrogate pair",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number within its limits",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "literal_error": "must be one of {expected}",
    "enum": "must be one of {expected}",
    "model_attributes_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "dict_type": "must be a JSON object",
}


_FIELD_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TYPE_NAMES = frozenset({"bool", "bytes", "dict", "float", "int", "list", "none", "str", "tuple"})


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ServiceError:
    """The refusal for pydantic's errors, in our words. Of each `loc` the first part says where, the next what."""
    if any(error["type"] == "json_invalid" for error in errors):
        return MalformedBody("The request body is not well-formed JSON.")
    sentences = [_sentence(error) for error in errors[:5]]
    return InvalidField(" ".join(dict.fromkeys(sentences)))


def _path(location: Sequence[str | int]) -> str:
    """Where a field is, as `loras[0].name`; pydantic's names of types among the parts are left out."""
    path = str(location[0])[:64]
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif _FIELD_NAME.fullmatch(part) and part not in _TYPE_NAMES:
            path += f".{part}"
    return path


def _sentence(error: Mapping[str, Any]) -> str:
    field = f"'{_path(error['loc'][1:])}'" if error["loc"][1:] else "The request body"  # before: body, query or path
    if error["type"].startswith("zimage_"):  # raised by shared.schemas: the text is ours
        return f"{field} {error['msg']}."
    template = _SENTENCES.get(error["type"], "is not valid")
    return f"{field} {template.format(**error.get('ctx', {}))}."
