"""`shared.errors` and `shared.problems`: every refusal by its class, and the sentences that clients get."""

import json
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from shared import errors
from shared.errors import BY_CODE, InternalError, QueueFull, ServiceError, UnknownName, rebuild
from shared.problems import MEDIA_TYPE, Problem, install_handlers, problem_response, responses

EXPECTED = {
    "MalformedBody": (400, "malformed_body"),
    "Unauthorized": (401, "unauthorized"),
    "UnknownName": (404, "not_found"),
    "MethodNotAllowed": (405, "method_not_allowed"),
    "BodyTooLarge": (413, "too_large"),
    "WrongContentType": (415, "wrong_content_type"),
    "InvalidField": (422, "invalid_field"),
    "QueueFull": (429, "queue_full"),
    "WrongHost": (421, "wrong_host"),
    "HeadersTooLarge": (431, "headers_too_large"),
    "ClientGone": (499, "client_gone"),
    "InternalError": (500, "internal_error"),
    "NumericalError": (500, "numerical_error"),
    "BadUpstream": (502, "bad_upstream"),
    "Unready": (503, "unready"),
    "Unreachable": (503, "unreachable"),
    "OutOfMemory": (503, "out_of_memory"),
    "UpstreamTimeout": (504, "upstream_timeout"),
}


def classes() -> list[type[ServiceError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServiceError)]


@pytest.mark.parametrize(("name", "expected"), EXPECTED.items())
def test_status_and_code_are_what_clients_know(name: str, expected: tuple[int, str]) -> None:
    kind = getattr(errors, name)
    assert (kind.status, kind.code) == expected


def test_codes_are_unique_and_every_class_is_known_by_its_own() -> None:
    concrete = [kind for kind in classes() if kind is not ServiceError]
    assert len({kind.code for kind in concrete}) == len(concrete)
    assert set(EXPECTED) <= {kind.__name__ for kind in concrete}
    assert {kind.code: kind for kind in concrete} == BY_CODE


@pytest.mark.parametrize("kind", BY_CODE.values(), ids=lambda kind: kind.__name__)
def test_rebuild_makes_the_same_error(kind: type[ServiceError]) -> None:
    original = kind("'width' must be at least 16.", retry_after_s=7)
    again = rebuild(original.code, original.detail, retry_after_s=original.retry_after_s)
    assert type(again) is kind
    assert (again.detail, again.retry_after_s, str(again)) == (original.detail, 7, original.detail)


@pytest.mark.parametrize("code", ["", "teapot", "INTERNAL_ERROR", "not_found "])
def test_rebuild_knows_no_other_code(code: str) -> None:
    assert rebuild(code, "text") is None


@pytest.mark.parametrize("kind", BY_CODE.values(), ids=lambda kind: kind.__name__)
def test_the_problem_of_an_error(kind: type[ServiceError]) -> None:
    response = problem_response(kind("A sentence.", retry_after_s=3), "id-12345")
    assert response.status_code == kind.status
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.headers["retry-after"] == "3"
    assert json.loads(response.body) == {
        "type": "about:blank",
        "title": kind.title,
        "status": kind.status,
        "detail": "A sentence.",
        "code": kind.code,
        "request_id": "id-12345",
    }


def test_retry_after_is_there_only_when_it_is_known() -> None:
    assert "retry-after" not in problem_response(QueueFull("Full."), None).headers
    assert problem_response(QueueFull("Full.", retry_after_s=0), None).headers["retry-after"] == "0"


def test_responses_document_each_status_with_an_example_for_each_code() -> None:
    documented = responses(*BY_CODE.values())
    assert set(documented) == {kind.status for kind in BY_CODE.values()}
    for kind in BY_CODE.values():
        content = documented[kind.status]["content"][MEDIA_TYPE]
        example = content["examples"][kind.code]["value"]
        assert Problem.model_validate(example).code == kind.code
        assert example["status"] == kind.status
        assert set(content["schema"]["properties"]) == set(Problem.model_fields)
    assert set(documented[503]["content"][MEDIA_TYPE]["examples"]) == {
        "unready",
        "not_begun",
        "device_failed",
        "unreachable",
        "out_of_memory",
    }


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    text: str = Field(min_length=2, max_length=5)
    count: int = Field(1, ge=1, le=9)
    share: float = Field(0.5, gt=0, lt=1, allow_inf_nan=False)
    flag: bool = False
    items: list[int] = Field(default=[1], min_length=1, max_length=2)


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    install_handlers(app)

    @app.post("/body")
    def body(body: Body) -> Body:
        return body

    @app.get("/query")
    def query(number: int) -> int:
        return number

    @app.get("/status/{status}")
    def status(status: int) -> None:
        raise HTTPException(status, "a library's own text")

    @app.get("/name")
    def name() -> None:
        raise UnknownName("There is no such name.")

    @app.get("/validation")
    def validation() -> None:
        raise RequestValidationError([{"type": "never heard of", "loc": ("body", "x"), "msg": "secret", "input": "y"}])

    return TestClient(app)


def problem_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == MEDIA_TYPE
    problem = response.json()
    assert problem["status"] == status
    assert set(problem) == set(Problem.model_fields)
    return problem


SENTENCES = {
    "missing": ({}, "'text' is required."),
    "unknown": ({"text": "abc", "hight": 1}, "'hight' is not a field of this request."),
    "no string": ({"text": 3}, "'text' must be a string."),
    "null": ({"text": None}, "'text' must be a string."),
    "short": ({"text": "a"}, "'text' must have at least 2 characters."),
    "long": ({"text": "abcdef"}, "'text' must have at most 5 characters."),
    "no whole number": ({"text": "abc", "count": 1.5}, "'count' must be a whole number."),
    "a number in quotes": ({"text": "abc", "count": "1"}, "'count' must be a whole number."),
    "true as a number": ({"text": "abc", "count": True}, "'count' must be a whole number."),
    "too little": ({"text": "abc", "count": 0}, "'count' must be at least 1."),
    "too much": ({"text": "abc", "count": 10}, "'count' must be at most 9."),
    "the bound itself": ({"text": "abc", "share": 0}, "'share' must be greater than 0.0."),
    "the other bound": ({"text": "abc", "share": 1}, "'share' must be less than 1.0."),
    "no number": ({"text": "abc", "share": "x"}, "'share' must be a number."),
    "no bool": ({"text": "abc", "flag": "yes"}, "'flag' must be true or false."),
    "no list": ({"text": "abc", "items": 1}, "'items' must be a list."),
    "no items": ({"text": "abc", "items": []}, "'items' must have at least 1 items."),
    "many items": ({"text": "abc", "items": [1, 2, 3]}, "'items' must have at most 2 items."),
    "a bad item": ({"text": "abc", "items": [1, "x"]}, "'items[1]' must be a whole number."),
    "two at once": ({"count": 0}, "'text' is required. 'count' must be at least 1."),
    "a list as body": ([], "The request body must be a JSON object."),
    "a string as body": ("text", "The request body must be a JSON object."),
    "null as body": (None, "The request body is required."),
    "named like a place": ({"text": "abc", "path": 1}, "'path' is not a field of this request."),
    "named body": ({"text": "abc", "body": 1}, "'body' is not a field of this request."),
}


@pytest.mark.parametrize(("body", "detail"), SENTENCES.values(), ids=SENTENCES.keys())
def test_sentences_name_the_field_and_the_limit(client: TestClient, body: Any, detail: str) -> None:
    problem = problem_of(client.post("/body", json=body), 422)
    assert problem["detail"] == detail
    assert problem["code"] == "invalid_field"


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b'{"text": "abc", "share": NaN}', "'share' must be a finite number."),
        (b'{"text": "abc", "share": Infinity}', "'share' must be a finite number."),
        (b'{"text": "abc", "share": 1e400}', "'share' must be a finite number."),
        (b'{"text": "abc", "count": NaN}', "'count' must be a whole number."),
        (b'{"text": "abc", "count": 1e400}', "'count' must be a whole number."),
    ],
)
def test_numbers_that_are_none(client: TestClient, content: bytes, detail: str) -> None:
    response = client.post("/body", content=content, headers={"content-type": "application/json"})
    problem = problem_of(response, 422)
    assert problem["detail"] == detail
    assert not {"nan", "inf", "infinity"} & set(response.text.lower().replace('"', " ").split())


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"not json",
        b"\xff\xfe",
        b'{"text": "\xff"}',
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"text":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"count": ' + b"9" * 10_000 + b"}",
    ],
    ids=["cut", "words", "bytes", "latin-1", "open lists", "nested lists", "nested objects", "10,000 digits"],
)
def test_bodies_that_cannot_be_parsed(client: TestClient, content: bytes) -> None:
    response = client.post("/body", content=content, headers={"content-type": "application/json"})
    problem = problem_of(response, 400)
    assert problem["code"] == "malformed_body"
    assert problem["detail"] == "The request body is not well-formed JSON."


def test_a_field_name_is_cut_and_escaped(client: TestClient) -> None:
    problem = problem_of(client.post("/body", json={"text": "abc", "n" * 5_000: 1}), 422)
    assert len(problem["detail"]) < 200
    lone = client.post("/body", content=b'{"text": "abc", "\\ud800": 1}', headers={"content-type": "application/json"})
    problem_of(lone, 422)


def test_many_errors_make_a_short_answer(client: TestClient) -> None:
    body = {"text": "abc", **{f"extra{n}": n for n in range(1000)}}
    assert len(problem_of(client.post("/body", json=body), 422)["detail"]) < 500


def test_query_parameters_are_named_too(client: TestClient) -> None:
    assert problem_of(client.get("/query?number=x"), 422)["detail"] == "'number' must be a whole number."
    assert problem_of(client.get("/query"), 422)["detail"] == "'number' is required."


def test_an_error_type_without_a_sentence_tells_nothing_of_the_librarys(client: TestClient) -> None:
    response = client.get("/validation")
    assert problem_of(response, 422)["detail"] == "'x' is not valid."
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("status", "answered", "code"),
    [
        (400, 400, "malformed_body"),
        (404, 404, "not_found"),
        (405, 405, "method_not_allowed"),
        (413, 413, "too_large"),
        (415, 415, "wrong_content_type"),
        (429, 429, "queue_full"),
        (418, 500, "internal_error"),
        (401, 401, "unauthorized"),
    ],
)
def test_the_frameworks_errors_become_ours(client: TestClient, status: int, answered: int, code: str) -> None:
    response = client.get(f"/status/{status}")
    assert problem_of(response, answered)["code"] == code
    assert "library" not in response.text


def test_unknown_paths_and_methods(client: TestClient) -> None:
    assert problem_of(client.get("/nowhere"), 404)["detail"].startswith("There is nothing at /nowhere")
    refused = client.delete("/body")
    assert problem_of(refused, 405)["detail"].startswith("/body does not answer DELETE")
    assert refused.headers["allow"] == "POST"
    assert len(problem_of(client.get("/" + "x" * 5_000), 404)["detail"]) < 300


def test_our_own_errors_pass_with_their_text(client: TestClient) -> None:
    problem = problem_of(client.get("/name"), 404)
    assert problem["detail"] == "There is no such name."
    assert problem["title"] == UnknownName.title


def test_every_sentence_can_be_filled_from_pydantics_context(client: TestClient) -> None:
    """No answer shows a place holder, whatever pydantic refuses in this model."""
    with pytest.raises(ValidationError) as refused:
        Body.model_validate({"text": "a", "count": 0, "share": 1.0, "flag": 1, "items": []})
    answer = client.post("/body", json={"text": "a", "count": 0, "share": 1.0, "flag": 1, "items": []})
    detail = problem_of(answer, 422)["detail"]
    assert detail.count("must") == refused.value.error_count()
    assert "{" not in detail
    assert InternalError.title not in detail
