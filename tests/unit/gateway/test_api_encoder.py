"""A gateway whose prompts another program encodes."""

import asyncio
from pathlib import Path

from inprocess import client_of, served
from starlette.types import Receive, Scope, Send

from services.gateway.app import create_app
from services.gateway.settings import GatewaySettings


async def refusing_texts(scope: Scope, receive: Receive, send: Send) -> None:
    """A server that lists models, and finds every text too long."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    status = 200 if scope["method"] == "GET" else 400
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


async def test_a_text_that_it_refuses_takes_it_from_nobody(tmp_path: Path) -> None:
    async with served(refusing_texts) as url:
        settings = GatewaySettings.model_validate(
            {"use_api_encoder": True, "api_url": url, "encoder_only": True, "data_dir": tmp_path}
        )
        app = await asyncio.to_thread(create_app, settings)
        async with client_of(app) as client:
            for _ in range(3):
                answer = await client.post("/api/encode", json={"prompt": "A cat"})
                assert (answer.status_code, answer.json()["code"]) == (422, "invalid_field")
                assert "status 400" in answer.json()["detail"]
                assert (await client.get("/health/ready")).is_success
