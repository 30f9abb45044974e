"""Requests for a host that the server is not known by: a page whose name was made to lead here must read nothing."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from fastapi import APIRouter, FastAPI
from inprocess import bare_app, client_of
from pydantic import ValidationError

from services.gateway.settings import GatewaySettings
from shared.addresses import host_name, is_known_host

OWN = [
    "",
    "localhost",
    "localhost:7860",
    "LocalHost.",
    "a.localhost:1",
    "127.0.0.1:7860",
    "192.168.1.5",
    "[::1]:7860",
    "[fe80::1%25eth0]",
    "gateway:7860",
    "gpu-host.local",
    "host.docker.internal:7860",
    "pc.home.arpa",
]
STRANGE = [
    "example.com",
    "rebound.example.com:7860",
    "127.0.0.1.nip.io",
    "localhost.example.com",
    "mylocal.host",
    "notlocal.com.",
    "1.2.3",
]


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def make_app(hosts: tuple[str, ...] | None) -> FastAPI:
    router = APIRouter()

    @router.post("/work")
    async def work(body: dict[str, Any]) -> dict[str, Any]:
        return body

    return bare_app(router, hosts=hosts)


@pytest.fixture
def closed() -> FastAPI:
    return make_app(())


async def statuses(app: FastAPI, hosts: list[str]) -> dict[str, int]:
    async with client_of(app) as client:
        answers = {host: await client.post("/work", json={}, headers={"host": host}) for host in hosts}
    return {host: answer.status_code for host, answer in answers.items()}


async def test_strangers_names_are_refused(closed: FastAPI) -> None:
    assert await statuses(closed, OWN) == dict.fromkeys(OWN, 200)
    assert await statuses(closed, STRANGE) == dict.fromkeys(STRANGE, 421)


async def test_the_refusal_is_a_problem_that_says_what_to_do(closed: FastAPI) -> None:
    async with client_of(closed) as client:
        answer = await client.post("/work", json={}, headers={"host": "example.com", "x-request-id": "of-this-test"})
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (problem["code"], problem["request_id"]) == ("wrong_host", "of-this-test")
    assert "ZIMAGE_ALLOWED_HOSTS" in problem["detail"]


async def test_names_that_are_given_are_answered() -> None:
    app = await asyncio.to_thread(make_app, ("images.example.com", "*.lab.example"))
    told = await statuses(
        app, ["images.example.com:443", "a.lab.example", "a.b.lab.example", "lab.example", "example.com", "localhost"]
    )
    assert list(told.values()) == [200, 200, 200, 421, 421, 200]


@pytest.mark.parametrize("hosts", [None, ("*",)])
async def test_without_patterns_or_with_the_one_for_all_every_name_is_answered(hosts: tuple[str, ...] | None) -> None:
    app = await asyncio.to_thread(make_app, hosts)
    assert set((await statuses(app, [*OWN, *STRANGE])).values()) == {200}


async def test_the_body_is_not_read(closed: FastAPI) -> None:
    asked: list[str] = []

    async def receive() -> dict[str, Any]:
        asked.append("body")
        await asyncio.Event().wait()
        raise AssertionError

    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/work",
        "raw_path": b"/work",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"host", b"example.com"), (b"content-length", b"100")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
    await asyncio.wait_for(closed(scope, receive, send), 5)
    assert sent[0]["status"] == 421
    assert not asked


@pytest.mark.parametrize("host", STRANGE)
def test_no_strange_name_is_taken_for_an_own_one(host: str) -> None:
    assert not is_known_host(host_name(host), ())


def test_who_is_answered_without_a_list_is_decided_by_the_address() -> None:
    assert GatewaySettings().hosts == ()
    assert GatewaySettings(host="localhost").hosts == ()
    assert GatewaySettings(host="0.0.0.0").hosts == ("*",)
    assert GatewaySettings(host="0.0.0.0", allowed_hosts="a.example, *.B.example").hosts == ("a.example", "*.b.example")


@pytest.mark.parametrize("pattern", ["http://a.example", "a example", "a.*", "**", "*.", "a..b", "a/b"])
def test_what_is_no_name_is_refused_at_the_start(pattern: str) -> None:
    with pytest.raises(ValidationError, match="this is no name of a host"):
        GatewaySettings(allowed_hosts=(pattern,))
