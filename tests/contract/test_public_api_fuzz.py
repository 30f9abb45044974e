"""Thousands of generated requests against every public endpoint: whatever comes, the answer is no 5xx.

The services behind the gateway are stand-ins that answer at once: what is tested is that nothing reaches them, or comes
back from them, that the gateway cannot tell. `ZIMAGE_FUZZ_REQUESTS` sets how many requests an endpoint gets.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from inprocess import client_of

from services.gateway.app import create_app
from services.gateway.clients import DiffusionClient, Embeddings, Encoding
from services.gateway.settings import GatewaySettings
from shared.client import Reply, ServiceClient
from shared.errors import ServiceError
from shared.schemas.diffusion import DiffusionParameters
from shared.schemas.public import GenerateRequest

REQUESTS = int(os.environ.get("ZIMAGE_FUZZ_REQUESTS", "300"))
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
FIELDS = [*GenerateRequest.model_fields, "unknown"]


class QuickEncoder:
    """Answers two tokens for every text."""

    def __init__(self) -> None:
        self.service = ServiceClient("encoder", "http://encoder", max_reply_bytes=1)

    async def probe(self) -> ServiceError | None:
        return None

    async def encode(self, texts: Sequence[str], *, layer: int, timeout_s: float) -> Encoding:
        return Encoding(tuple(Embeddings("F32", (2, 4), memoryview(bytes(32))) for _ in texts), 0.001)

    async def count_tokens(self, text: str, *, timeout_s: float) -> int:
        text.encode()
        return 2


class QuickDiffusion(DiffusionClient):
    """Answers the head of a PNG."""

    def __init__(self) -> None:
        super().__init__(ServiceClient("diffusion", "http://diffusion", max_reply_bytes=1))

    async def probe(self) -> ServiceError | None:
        return None

    async def generate(
        self, parameters: DiffusionParameters, text: Embeddings, negative: Embeddings | None, *, timeout_s: float
    ) -> Reply:
        parameters.model_dump_json()
        return Reply(headers={}, body=PNG)


def scalars() -> st.SearchStrategy[Any]:
    """Values that fields take, nearly take, and never take."""
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.sampled_from([0, 1, -1, -2, 16, 64, 1000, 1024, 8192, 8208, 100, 101, 30.0, 1e308, 2**63, 2**63 - 1]),
        st.floats(),
        st.text(max_size=40),
        st.sampled_from(["", " ", "\0", "\ud800", '"', "default", "pool", "../../etc/passwd", "1024px", "x" * 33_000]),
    )


def bodies() -> st.SearchStrategy[bytes]:
    """JSON objects of the API's fields, other JSON, and bytes that are none."""
    values = st.recursive(scalars(), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=4)
    objects = st.dictionaries(st.sampled_from(FIELDS), values, max_size=8)
    likely = st.builds(lambda rest: {"prompt": "a cat", **rest}, objects)
    others = st.recursive(
        scalars(), lambda inner: st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=5
    )
    as_json = st.one_of(likely, objects, others).map(lambda value: json.dumps(value).encode())
    return st.one_of(as_json, as_json, as_json, st.binary(max_size=60))


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    """The gateway in front of the stand-ins."""
    return create_app(GatewaySettings(data_dir=tmp_path), encoder=QuickEncoder(), diffusion=QuickDiffusion())


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of it."""
    async with client_of(app) as client:
        yield client


async def check(client: httpx2.AsyncClient, method: str, path: str, body: bytes | None, kind: str) -> int:
    """Sends one request and checks its answer; the status is answered."""
    answer = await client.request(method, path, content=body, headers={"content-type": kind})
    assert answer.status_code < 500, (body, answer.text)
    if answer.status_code >= 400:
        problem = answer.json()
        assert problem["detail"]
        assert problem["code"]
        assert "Traceback" not in answer.text
    return answer.status_code


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/api/generate", "/api/encode", "/api/format-prompt", "/api/save-embeddings"])
def test_no_body_breaks_an_endpoint(path: str, app: FastAPI) -> None:
    statuses: set[int] = set()

    async def all_requests() -> None:
        async with client_of(app) as client:
            for body in generated:
                statuses.add(await check(client, "POST", path, body, "application/json"))

    generated: list[bytes] = []

    @settings(
        max_examples=REQUESTS,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(bodies())
    def collect(body: bytes) -> None:
        generated.append(body)

    collect()
    asyncio.run(all_requests())
    assert len(generated) >= REQUESTS * 0.9
    assert {200, 422} <= statuses, f"the generated requests reached only {statuses}"


@pytest.mark.parametrize(
    "path", ["/api/history", "/api/history/{}/image", "/api/templates", "/api/rewriters", "/health"]
)
@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
async def test_no_path_or_query_breaks_an_endpoint(client: httpx2.AsyncClient, method: str, path: str) -> None:
    for value in ("0", "-1", "abc", "9" * 40, "%00", "..%2f..", "é", "1e9", "None", "%2e%2e%2f"):
        answer = await client.request(
            method, path.format(value), params={"limit": value, "offset": value, "images": value}
        )
        # 503 is this server's honest answer where it keeps no history
        assert answer.status_code < 500 or (answer.status_code == 503 and "history" in path), answer.text
