"""The examples of the specification, sent as they stand, and what it says of the answers."""

import json
import re
from typing import Any

import httpx2
import pytest
from servers import Running, png_size, shared_file, wait_until

pytestmark = pytest.mark.slow
SPECIFICATION = "spec/web_server_api.md"


def section(title: str) -> str:
    """The text below a heading of the specification, up to the next heading."""
    text = shared_file(SPECIFICATION).read_text()
    match = re.search(rf"^### {re.escape(title)}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"the specification has no section '{title}'"
    return match[1]


def example(title: str, kind: str) -> Any:
    """The JSON example of a request or an answer."""
    match = re.search(rf"\*\*{kind}:\*\*\n```json\n(.*?)```", section(title), re.DOTALL)
    assert match, f"'{title}' has no example {kind}"
    return json.loads(match[1])


def test_generate(client: httpx2.Client) -> None:
    body = {**example("POST /api/generate", "Request"), "width": 128, "height": 64}
    answer = client.post("/api/generate", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    assert png_size(answer.content) == (128, 64)
    assert float(answer.headers["x-generation-time"]) > 0
    assert 0 <= int(answer.headers["x-seed"]) < 2**63
    again = client.post("/api/generate", json={**body, "seed": int(answer.headers["x-seed"])})
    assert again.content == answer.content


def test_each_stage_is_timed(client: httpx2.Client) -> None:
    answer = client.post("/api/generate", json={"prompt": "A cat", "width": 64, "height": 64, "steps": 2})
    stages = dict(re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"]))
    assert list(stages) == ["encode", "queue", "denoise", "decode", "png", "history", "total"]
    parts = sum(float(value) for name, value in stages.items() if name != "total")
    assert 0 < parts <= float(stages["total"])


@pytest.mark.parametrize("path", ["/api/encode", "/api/format-prompt"])
def test_request_and_answer(client: httpx2.Client, path: str) -> None:
    body, documented = example(f"POST {path}", "Request"), example(f"POST {path}", "Response")
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    got = answer.json()
    assert got.keys() >= documented.keys()
    assert {name: type(got[name]) for name in documented} == {name: type(value) for name, value in documented.items()}
    assert {name: got[name] for name in body if name in documented} == {n: body[n] for n in body if n in documented}
    assert got["formatted_prompt"] == documented["formatted_prompt"]


def formats() -> list[tuple[dict[str, Any], str]]:
    """The examples of the chat format: a request and the text that it becomes."""
    text = shared_file(SPECIFICATION).read_text()
    found = re.findall(r"```json\n(\{[^`]*?\})\n```\nResult:\n```\n(.*?)\n```", text, re.DOTALL)
    return [(json.loads(request), result) for request, result in found]


def test_formatted_prompts(client: httpx2.Client) -> None:
    assert len(formats()) == 5
    for request, result in formats():
        answer = client.post("/api/format-prompt", json=request)
        assert answer.json()["formatted_prompt"].removesuffix("\n") == result
        assert client.post("/api/encode", json=request).json()["token_count"] == answer.json()["token_count"]
        drawn = client.post("/api/generate", json={**request, "width": 64, "height": 64, "steps": 1})
        assert png_size(drawn.content) == (64, 64)


@pytest.mark.parametrize(("path", "entries"), [("/api/templates", "templates"), ("/api/rewriters", "rewriters")])
def test_lists(client: httpx2.Client, path: str, entries: str) -> None:
    documented = example(f"GET {path}", "Response")
    got = client.get(path).json()
    assert got[entries]
    for entry in got[entries]:
        assert entry.keys() >= documented[entries][0].keys()


def test_health(client: httpx2.Client) -> None:
    got = client.get("/health").json()
    assert {name: got[name] for name in example("GET /health", "Response")} == example("GET /health", "Response")


def test_docs(client: httpx2.Client) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    assert "/openapi.json" in page.text
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert document["paths"].keys() >= {
        "/api/generate",
        "/api/encode",
        "/api/format-prompt",
        "/api/templates",
        "/api/rewriters",
        "/health",
    }


def test_request_id_reaches_the_diffusion_log(server: Running, client: httpx2.Client) -> None:
    request_id = "e2e-request.0123456789"
    body = {"prompt": "A cat that no other test asks for", "width": 64, "height": 64, "steps": 1}
    answer = client.post("/api/generate", json=body, headers={"X-Request-ID": request_id})
    assert answer.headers["x-request-id"] == request_id

    def logged(service: str) -> list[dict[str, Any]]:
        return [event for event in server.events(service) if event.get("request_id") == request_id]

    for service, path in (
        ("gateway", "/api/generate"),
        ("encoder", "/v1/hidden_states"),
        ("diffusion", "/v1/generate"),
    ):
        events = wait_until(lambda service=service: logged(service), f"{request_id} in the log of {service}")
        assert [(event["path"], event["status"]) for event in events if event["event"] == "request"] == [(path, 200)]
