"""Thousands of generated requests against every public endpoint: whatever comes, the answer is no 5xx.

The services behind the gateway are stand-ins that answer at once: what is tested is that nothing reaches them, or comes
back from them, that the gateway cannot tell. Server, sockets and history are real. `ZIMAGE_FUZZ_REQUESTS` sets how many
requests an endpoint gets.
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from embedded_redis import embedded_redis
from fastapi import FastAPI
from generated_requests import WORKING, bodies, generated, targets
from inprocess import node_of, served, until
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.app import create_app
from services.gateway.clients import EncoderClient
from services.gateway.commissions import DiffusionClient
from services.gateway.embeddings import EmbeddingCache
from services.gateway.members import Probe
from services.gateway.nodes import Nodes
from services.gateway.references import VlClient, ask_vl_facts
from services.gateway.rewriting import RewriterClient
from services.gateway.settings import GatewaySettings
from services.gateway.store import Bounds, History
from shared.client import ServiceClient
from shared.errors import UnknownName
from shared.problems import MEDIA_TYPE, problem_response
from shared.schemas.diffusion import LoraList
from shared.schemas.encoder import Tokens
from shared.schemas.rewriter import Rewritten
from shared.schemas.vl import Extracted, VlFacts
from shared.wire import TensorMeta, build_header

pytestmark = pytest.mark.slow
REQUESTS = int(os.environ.get("ZIMAGE_FUZZ_REQUESTS", "300"))
JSON = {"content-type": "application/json"}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
RUNNING = "0"  # the only request that the stand-in for the diffusion service knows
ENTRY = {"prompt": "a cat", "seed": 7, "timestamp": 1733285000.0}  # as an older version may have kept it
REWRITTEN = Rewritten(
    rewritten_prompt="an orange cat", thinking_content=None, backend="local", finish_reason="stop", seed=1
)


VISION = VlFacts(
    service="vl",
    version="0",
    name="vl",
    model_path="/vl",
    device="cpu",
    dtype="float32",
    width=4,
    layers=8,
    target_std=1.0,
    auto_unload=True,
    loaded=False,
    fingerprint="0",
)
EXTRACTED = Extracted(fingerprint="0", hidden_layer=-2, original_std=1.0, scaled_std=1.0).model_dump_json()


ANSWERS: dict[str, str | bytes] = {
    "/v1/tokenize": Tokens(tokens=[[1, 2]], counts=[2]).model_dump_json(),
    "/v1/generate": PNG,
    "/v1/loras": LoraList(loras=[]).model_dump_json(),
    "/v1/rewrite": REWRITTEN.model_dump_json(),
    "/v1/describe": REWRITTEN.model_dump_json(),
    "/v1/extract": build_header([TensorMeta("vl", "F32", (2, 4))], {"extracted": EXTRACTED}) + bytes(32),
}
"""Answers that are the same whatever is asked."""


async def answer_of(request: Request) -> Response:
    """What a service answers: two tokens for every text, the head of a PNG, an orange cat."""
    body = await request.body()
    match request.method, request.url.path:
        case "POST", "/v1/hidden_states":
            metas = [TensorMeta(f"hidden_states.{n}", "F32", (2, 4)) for n in range(len(json.loads(body)["input"]))]
            return Response(build_header(metas) + bytes(32 * len(metas)))
        case "GET", "/v1/model":
            return Response(VISION.model_copy(update={"service": request.url.hostname}).model_dump_json())
        case _, path if path in ANSWERS:
            return Response(ANSWERS[path])
        case "DELETE", path if path == f"/v1/generate/{RUNNING}":
            return Response()
    return problem_response(UnknownName("There is no such thing."), None)


async def stand_in(scope: Scope, receive: Receive, send: Send) -> None:
    """All services but the gateway."""
    await (await answer_of(Request(scope, receive)))(scope, receive, send)


def nodes(name: str, probe: Probe | None = None) -> Nodes:
    """The stand-in as the only node."""
    transport = httpx2.ASGITransport(stand_in)
    return node_of(ServiceClient(name, f"http://{name}", max_reply_bytes=1 << 20, transport=transport), probe=probe)


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of these tests alone."""
    with embedded_redis(tmp_path_factory.mktemp("redis")) as redis:
        yield redis.url


@pytest.fixture
def app(tmp_path: Path, redis_url: str) -> FastAPI:
    """The gateway in front of the stand-ins."""
    return create_app(
        GatewaySettings(data_dir=tmp_path, redis_url=redis_url),
        encoder=EncoderClient(nodes("encoder")),
        diffusion=DiffusionClient(nodes("diffusion")),
        rewriter=RewriterClient(nodes("rewriter")),
        vl=VlClient(nodes("vl", ask_vl_facts)),
    )


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def check(answer: httpx2.Response, sent: object) -> int:
    """Checks an answer and gives its status."""
    assert answer.status_code < 500, (sent, answer.text)
    if answer.status_code >= 400:
        problem = answer.json()
        assert answer.headers["content-type"] == MEDIA_TYPE, sent
        assert problem["detail"], sent
        assert problem["code"], sent
        assert "Traceback" not in answer.text
    return answer.status_code


def http(url: str) -> httpx2.AsyncClient:
    """A client that sends what it is told to and follows nothing."""
    return httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False)


DOCUMENT: dict[str, Any] = create_app(GatewaySettings()).openapi()
SCHEMAS = DOCUMENT["components"]["schemas"]
OPERATIONS = [(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods]


@pytest.mark.parametrize("path", [path for method, path in OPERATIONS if method == "POST"])
def test_no_body_breaks_an_endpoint(path: str, app: FastAPI) -> None:
    sent = generated(bodies(DOCUMENT["paths"][path]["post"], SCHEMAS), REQUESTS)
    statuses: Counter[int] = Counter()

    async def send_all() -> None:
        async with served(app) as url, http(url) as client:
            for body in sent:
                statuses[check(await client.post(path, content=body, headers=JSON), body)] += 1

    asyncio.run(send_all())
    assert statuses.total() >= REQUESTS * 0.9
    assert {200, 422} <= statuses.keys(), f"the generated requests reached only {statuses}"


@pytest.mark.parametrize(("method", "path"), [(method, path) for method, path in OPERATIONS if method != "POST"])
def test_no_path_or_query_breaks_an_endpoint(method: str, path: str, app: FastAPI, redis_url: str) -> None:
    operation = DOCUMENT["paths"][path][method.lower()]
    sent = generated(targets(path, operation, SCHEMAS), REQUESTS)
    statuses: Counter[int] = Counter()

    async def send_all() -> None:
        async with (
            served(app) as url,
            http(url) as client,
            History(redis_url, Bounds(100, 1 << 20)) as history,
            EmbeddingCache(redis_url, max_bytes=1 << 20, ttl_s=60) as cache,
        ):
            await until(client, "/health/ready", lambda answer: answer.is_success)
            await history.clear()
            for target in sent:
                if not await history.count():
                    entry_id = await history.add(ENTRY, PNG, b"")
                if "/vl/" in path:
                    await cache.put(RUNNING, b"embeddings")
                asked = target.replace(WORKING, str(entry_id) if method == "GET" else RUNNING)
                answer = await client.request(method, "/", extensions={"target": asked.encode()})
                statuses[check(answer, asked)] += 1

    asyncio.run(send_all())
    assert statuses.total() >= REQUESTS * 0.9
    numbers = [item for item in operation.get("parameters", []) if item["schema"].get("type") != "string"]
    wanted = {200} | ({422} if numbers else set()) | ({404} if "{" in path else set())
    assert wanted <= statuses.keys(), f"the generated requests reached only {statuses}"
