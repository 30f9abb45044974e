"""`python -m benchmarks.passthrough PORT URL`: a server of FastAPI and httpx2 that passes requests on and answers back,
as the least that a gateway in this language can do."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import uvicorn
from fastapi import FastAPI, Request, Response


def create_app(url: str) -> FastAPI:
    """The app before the node of that base URL."""
    client = httpx2.AsyncClient(
        base_url=url, trust_env=False, timeout=None, limits=httpx2.Limits(max_keepalive_connections=64)
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    app = FastAPI(lifespan=lifespan, telemetry={"tracing": False, "metrics": False, "logs": False})

    @app.get("/health/ready")
    async def ready() -> None:
        return None

    @app.post("/api/encode")
    async def pass_on(request: Request) -> Response:
        headers = {"content-type": "application/json"}
        reply = await client.post("/v1/hidden_states", content=await request.body(), headers=headers)
        return Response(reply.content, reply.status_code, media_type=reply.headers["content-type"])

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
