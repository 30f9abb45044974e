"""The token that services share: where it comes from, who must show it, and who refuses to serve without it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from fastapi import APIRouter, FastAPI
from inprocess import bare_app, client_of

from services.diffusion.settings import DiffusionSettings
from services.encoder.settings import EncoderSettings
from services.gateway.settings import GatewaySettings
from services.rewriter.settings import RewriterSettings
from services.vl.settings import VlSettings
from shared.addresses import is_loopback
from shared.client import ServiceClient
from shared.errors import BadUpstream
from shared.settings import InvalidSettings, NodeSettings, read_settings

TOKEN = "a-token-of-32-characters-or-so-12"
NODES = [EncoderSettings, DiffusionSettings, RewriterSettings, VlSettings]


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def make_app(token: str | None) -> FastAPI:
    router = APIRouter(prefix="/v1")

    @router.post("/work")
    async def work(body: dict[str, Any]) -> dict[str, Any]:
        return body

    return bare_app(router, token=token)


@pytest.fixture
def guarded() -> FastAPI:
    return make_app(TOKEN)


@pytest.fixture
def unguarded() -> FastAPI:
    return make_app(None)


BEARER = {"authorization": f"Bearer {TOKEN}"}
OTHERS = [
    {},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": "Bearer another-token"},
    {"authorization": f"Bearer {TOKEN}x"},
    {"authorization": f"Basic {TOKEN}"},
    {"authorization": TOKEN},
    {"authorization": b"Bearer \xff\xfe"},
]


@pytest.mark.parametrize("headers", OTHERS)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/work"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/nothing")]
)
async def test_strangers_are_refused(guarded: FastAPI, headers: dict[str, Any], method: str, path: str) -> None:
    async with client_of(guarded) as client:
        answer = await client.request(method, path, headers=headers)
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert problem["request_id"] == answer.headers["x-request-id"]
        assert TOKEN not in answer.text


async def test_the_refusal_reads_nothing_of_the_body(guarded: FastAPI) -> None:
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(1)
        yield b"{}"

    async with client_of(guarded) as client:
        assert (await client.post("/v1/work", content=body())).status_code == 401
    assert read == []


async def test_who_shows_the_token_is_served(guarded: FastAPI) -> None:
    async with client_of(guarded) as client:
        assert (await client.post("/v1/work", json={"a": 1}, headers=BEARER)).json() == {"a": 1}
        assert (await client.get("/metrics", headers={"authorization": f"bearer {TOKEN}"})).status_code == 200


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
async def test_orchestrators_need_none(guarded: FastAPI, path: str) -> None:
    async with client_of(guarded) as client:
        assert (await client.get(path)).status_code == 200


async def test_without_a_token_all_are_served(unguarded: FastAPI) -> None:
    async with client_of(unguarded) as client:
        assert (await client.post("/v1/work", json={})).status_code == 200


async def test_a_service_tells_that_its_token_is_not_accepted(guarded: FastAPI) -> None:
    transport = httpx2.ASGITransport(guarded)
    async with ServiceClient("encoder", "http://encoder", max_reply_bytes=1000, transport=transport) as service:
        with pytest.raises(BadUpstream, match="does not accept this one's token"):
            await service.post_json("/v1/work", {}, timeout_s=5)


class TestSettings:
    def test_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ZIMAGE_SERVICE_TOKEN", TOKEN)
        settings = read_settings(GatewaySettings)
        assert settings.token == TOKEN
        assert settings.authorization == BEARER
        assert TOKEN not in repr(settings)

    def test_from_a_file(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        path = tmp_path / "token"
        path.write_text(TOKEN + "\n")
        monkeypatch.setenv("ZIMAGE_SERVICE_TOKEN_FILE", str(path))
        for kind in (*NODES, GatewaySettings):
            assert read_settings(kind).token == TOKEN
        monkeypatch.setenv("ZIMAGE_SERVICE_TOKEN", "that-of-the-environment")
        assert read_settings(EncoderSettings).token == "that-of-the-environment"

    def test_from_nowhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert read_settings(EncoderSettings).token is None
        assert read_settings(EncoderSettings).authorization == {}
        monkeypatch.setenv("ZIMAGE_SERVICE_TOKEN", "")
        monkeypatch.setenv("ZIMAGE_SERVICE_TOKEN_FILE", "")
        assert read_settings(EncoderSettings).token is None

    @pytest.mark.parametrize("token", ["short", "with a space in it", "ünprintable-in-a-header", "x" * 513])
    def test_one_that_cannot_be_used_is_not_told(self, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
        monkeypatch.setenv("ZIMAGE_SERVICE_TOKEN", token)
        with pytest.raises(InvalidSettings) as refused:
            _ = read_settings(EncoderSettings).token
        assert "ZIMAGE_SERVICE_TOKEN must be" in str(refused.value)
        assert token not in str(refused.value)

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidSettings, match="cannot be read"):
            _ = EncoderSettings(service_token_file=tmp_path / "gone").token


class TestListening:
    @pytest.mark.parametrize("kind", NODES)
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "gpu-host"])
    def test_beyond_this_machine_a_token_is_needed(self, kind: type[NodeSettings], host: str) -> None:
        name = kind.__name__.removesuffix("Settings").lower() + "_host"
        with pytest.raises(InvalidSettings, match="ZIMAGE_SERVICE_TOKEN_FILE"):
            kind(**{name: host}).require_token()
        kind(**{name: host, "service_token": TOKEN}).require_token()
        kind(**{name: host, "allow_no_token": True}).require_token()

    @pytest.mark.parametrize("kind", NODES)
    def test_on_this_machine_none_is(self, kind: type[NodeSettings]) -> None:
        kind().require_token()

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
    def test_addresses_that_only_this_machine_reaches(self, host: str) -> None:
        assert is_loopback(host)


class TestUrls:
    @pytest.mark.parametrize(
        ("text", "urls"),
        [
            ("http://a:1", ["http://a:1/"]),
            ("http://a:1, http://b:2,http://a:1", ["http://a:1/", "http://b:2/"]),
            ('["http://a:1,http://b:2", "http://c:3"]', ["http://a:1/", "http://b:2/", "http://c:3/"]),
            ("", []),
            (" , ", []),
        ],
    )
    def test_a_list_in_a_variable(self, monkeypatch: pytest.MonkeyPatch, text: str, urls: list[str]) -> None:
        monkeypatch.setenv("ZIMAGE_ENCODER_URLS", text)
        settings = read_settings(GatewaySettings)
        assert [str(url) for url in settings.encoder_urls] == urls
        assert list(settings.encoders) == urls or (not urls and settings.encoders == ("http://127.0.0.1:7861",))

    @pytest.mark.parametrize("text", ["ftp://a", "a:1", "[1", ",".join(f"http://h{n}" for n in range(65))])
    def test_what_is_none(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        monkeypatch.setenv("ZIMAGE_DIFFUSION_URLS", text)
        with pytest.raises(InvalidSettings, match="ZIMAGE_DIFFUSION_URLS"):
            read_settings(GatewaySettings)

    def test_a_list_in_the_file(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        path = tmp_path / "config.toml"
        path.write_text('[default.vl]\nurls = ["http://a:1", "http://b:2"]\n')
        monkeypatch.setenv("ZIMAGE_CONFIG", str(path))
        assert list(map(str, read_settings(GatewaySettings).vl_urls)) == ["http://a:1/", "http://b:2/"]
