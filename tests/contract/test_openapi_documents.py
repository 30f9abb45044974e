"""What Swagger shows: every public path with examples that work and with the refusals that it may answer."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from services.diffusion.app import create_app as create_diffusion
from services.diffusion.settings import DiffusionSettings
from services.encoder.app import create_app as create_encoder
from services.encoder.settings import EncoderSettings
from services.gateway.app import create_app as create_gateway
from services.gateway.settings import GatewaySettings
from services.rewriter.app import create_app as create_rewriter
from services.rewriter.settings import RewriterSettings
from shared.problems import MEDIA_TYPE as PROBLEM
from shared.problems import Problem
from shared.schemas.chat import ChatRequest
from shared.schemas.encoder import HiddenStatesRequest, TokenizeRequest
from shared.schemas.public import EncodeRequest, GenerateRequest, PromptRequest
from shared.schemas.rewriter import RewritePrompt, RewriteRequest

PUBLIC = {
    ("post", "/api/generate"),
    ("post", "/api/encode"),
    ("post", "/api/format-prompt"),
    ("post", "/api/save-embeddings"),
    ("get", "/api/templates"),
    ("get", "/api/rewriters"),
    ("post", "/api/rewrite"),
    ("get", "/api/history"),
    ("delete", "/api/history"),
    ("delete", "/api/history/{index}"),
    ("get", "/health"),
}
BODIES = {
    "/api/generate": GenerateRequest,
    "/api/encode": EncodeRequest,
    "/api/save-embeddings": EncodeRequest,
    "/api/format-prompt": PromptRequest,
    "/api/rewrite": RewriteRequest,
}


def documents(app: FastAPI) -> dict[str, Any]:
    document: dict[str, Any] = app.openapi()
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


@pytest.fixture(scope="module")
def gateway() -> dict[str, Any]:
    return documents(create_gateway(GatewaySettings()))


@pytest.fixture(scope="module")
def everything(gateway: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        "gateway": gateway,
        "encoder": documents(create_encoder(EncoderSettings())),
        "diffusion": documents(create_diffusion(DiffusionSettings())),
        "rewriter": documents(create_rewriter(RewriterSettings())),
    }


def test_the_paths_of_the_specification(gateway: dict[str, Any]) -> None:
    assert {(method, path) for method, path, _ in operations(gateway)} >= PUBLIC


def test_every_operation_says_what_it_does(everything: dict[str, dict[str, Any]]) -> None:
    for service, document in everything.items():
        assert document["info"]["description"]
        for method, path, operation in operations(document):
            assert operation["summary"], (service, method, path)


def test_every_refusal_is_a_problem_with_an_example(everything: dict[str, dict[str, Any]]) -> None:
    seen = 0
    for service, document in everything.items():
        for method, path, operation in operations(document):
            for status, response in operation["responses"].items():
                if status.startswith("2"):
                    continue
                assert set(response["content"]) == {PROBLEM}, (service, method, path, status)
                for code, example in response["content"][PROBLEM]["examples"].items():
                    problem = Problem.model_validate(example["value"])
                    assert (problem.status, problem.code) == (int(status), code)
                    seen += 1
    assert seen > 50


def test_requests_with_a_body_document_client_and_server_errors(everything: dict[str, dict[str, Any]]) -> None:
    for service, document in everything.items():
        for method, path, operation in operations(document):
            if "requestBody" in operation:
                assert {"400", "413", "415", "422", "503"} <= set(operation["responses"]), (service, method, path)


def test_every_public_path_documents_a_refusal(gateway: dict[str, Any]) -> None:
    for method, path, operation in operations(gateway):
        if path.startswith("/api/"):
            assert any(status[0] in "45" for status in operation["responses"]), (method, path)


@pytest.mark.parametrize(("path", "model"), BODIES.items())
def test_examples_of_bodies_are_good_requests(gateway: dict[str, Any], path: str, model: Any) -> None:
    content = gateway["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    assert len(content["examples"]) >= 2
    for example in content["examples"].values():
        assert example["summary"]
        model.model_validate(example["value"])


def schema_of(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    resolved: dict[str, Any] = document["components"]["schemas"][name] if name else schema
    return resolved


def example_from(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    """A body made of each field's own example or default; a field with neither is left out."""
    body = {}
    for name, field in schema_of(document, schema)["properties"].items():
        if "examples" in field:
            body[name] = field["examples"][0]
        elif "default" in field:
            body[name] = field["default"]
    return body


@pytest.mark.parametrize(
    ("service", "path", "model"),
    [
        *[("gateway", path, model) for path, model in BODIES.items()],
        ("encoder", "/v1/hidden_states", HiddenStatesRequest),
        ("encoder", "/v1/tokenize", TokenizeRequest),
        ("encoder", "/v1/chat/completions", ChatRequest),
        ("rewriter", "/v1/rewrite", RewritePrompt),
    ],
)
def test_examples_of_fields_make_a_good_request(
    everything: dict[str, dict[str, Any]], service: str, path: str, model: Any
) -> None:
    document = everything[service]
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body = example_from(document, schema)
    assert body
    model.model_validate(body)


def test_answers_of_json_have_a_schema_with_examples(gateway: dict[str, Any]) -> None:
    for method, path, operation in operations(gateway):
        content = operation["responses"]["200"].get("content", {})
        if path.startswith("/api/") and "application/json" in content:
            schema = schema_of(gateway, content["application/json"]["schema"])
            text = repr(schema) + "".join(repr(schema_of(gateway, item)) for item in nested(schema))
            assert "'examples'" in text, (method, path)


def nested(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for field in schema["properties"].values():
        for item in (field, field.get("items", {})):
            if "$ref" in item:
                yield item


def test_a_picture_and_its_headers_are_documented(gateway: dict[str, Any]) -> None:
    picture = gateway["paths"]["/api/generate"]["post"]["responses"]["200"]
    assert set(picture["content"]) == {"image/png", "multipart/mixed", "application/json", "text/event-stream"}
    assert {"X-Generation-Time", "X-Seed", "Server-Timing"} <= set(picture["headers"])


def test_the_limits_of_fields_are_documented(gateway: dict[str, Any]) -> None:
    properties = gateway["components"]["schemas"]["GenerateRequest"]["properties"]
    for name, limits in {
        "width": {"minimum": 16, "maximum": 8192},
        "steps": {"minimum": 1, "maximum": 100},
        "seed": {"minimum": 0},
        "hidden_layer": {"maximum": -1},
    }.items():
        documented = properties[name]["anyOf"][0]
        assert limits.items() <= documented.items(), name
    assert gateway["components"]["schemas"]["GenerateRequest"]["additionalProperties"] is False
    assert all(field.get("description") for field in properties.values())


def test_health_and_metrics_are_the_same_everywhere(everything: dict[str, dict[str, Any]]) -> None:
    for document in everything.values():
        assert {"/health/live", "/health/ready", "/metrics"} <= set(document["paths"])
        assert "503" in document["paths"]["/health/ready"]["get"]["responses"]
