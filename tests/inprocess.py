"""Runs apps for tests: in memory with their lifespan, or behind a real socket on loopback."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx2
import uvicorn
from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.members import Probe
from services.gateway.nodes import Nodes
from shared.client import ServiceClient
from shared.health import Metrics
from shared.protocol import BoundedProtocol
from shared.service import create_service

PATIENCE_S = 60.0


def bare_app(router: APIRouter, **options: Any) -> FastAPI:
    """A service of these routes alone, always ready; `options` are those of `create_service`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        yield {}

    return create_service(
        description="For tests.",
        lifespan=lifespan,
        routers=[router],
        readiness=lambda: None,
        metrics=Metrics("test"),
        **{"max_body_bytes": 1000, **options},
    )


@asynccontextmanager
async def started(app: FastAPI) -> AsyncIterator[ASGIApp]:
    """The app with its lifespan run and its state in every request's scope, as a server has it."""
    async with app.router.lifespan_context(app) as state:

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = dict(state or {})
            await app(scope, receive, send)

        yield with_state


async def nowhere(host: str, port: int) -> Sequence[str]:
    """A lookup of host names where nobody knows any."""
    raise OSError


def node_of(service: ServiceClient, *, probe: Probe | None = None) -> Nodes:
    """The nodes of a service that has this one only."""
    return Nodes(service.name, [service.base_url], lambda *_: service, probe=probe, resolve=nowhere)


@asynccontextmanager
async def client_of(app: FastAPI, *, ready: bool = True) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the running app; with `ready` it is handed out once the app says that it can work."""
    async with (
        started(app) as running,
        httpx2.AsyncClient(transport=httpx2.ASGITransport(running), base_url="http://test", timeout=None) as client,
    ):
        if ready:
            await until(client, "/health/ready", lambda answer: answer.is_success)
        yield client


async def until(client: httpx2.AsyncClient, path: str, condition: Callable[[httpx2.Response], object]) -> None:
    """Asks until the answer is as wanted; the test fails when it never is."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if condition(await client.get(path)):
                return
            await asyncio.sleep(0.005)


async def eventually(condition: Callable[[], object]) -> None:
    """Returns once the condition holds; the test fails when it never does."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.002)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the signals are pytest's


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[str]:
    """The base URL of a real uvicorn server on a free port of loopback, in this event loop."""
    opened = socket.create_server(("127.0.0.1", 0))
    listener = socket.socket(fileno=opened.detach())  # knows that it is TCP: only then asyncio sends without delay
    server = _Server(
        uvicorn.Config(app, http=BoundedProtocol, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    )
    running = asyncio.create_task(server.serve(sockets=[listener]))
    await eventually(lambda: server.started or running.done())
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await running
