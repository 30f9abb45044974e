"""A gateway whose prompts another program encodes."""

import asyncio
import json
from functools import partial
from pathlib import Path

import pytest
from inprocess import client_of, eventually, served
from starlette.types import Receive, Scope, Send

from services.gateway.app import _client, create_app
from services.gateway.clients import ApiEncoderClient, ask_foreign_facts
from services.gateway.nodes import Nodes
from services.gateway.settings import GatewaySettings
from shared.errors import InvalidField


async def refusing_texts(scope: Scope, receive: Receive, send: Send) -> None:
    """A server that lists models, and finds every text too long."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    status = 200 if scope["method"] == "GET" else 400
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


class OneOfTwo:
    """A server of hidden states that refuses the empty text, and is at work on any other until its client has gone."""

    def __init__(self) -> None:
        self.begun = self.gone = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        status = 200
        if scope["method"] == "POST":
            if json.loads(body)["input"].strip():
                self.begun += 1
                assert (await receive())["type"] == "http.disconnect"
                self.gone += 1
                return
            await eventually(lambda: self.begun)
            status = 400
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


async def test_when_one_text_is_refused_the_other_is_given_up() -> None:
    server = OneOfTwo()
    async with served(server) as url:
        connect = partial(_client, "API encoder", 1 << 20, None, foreign=True)
        pool = await asyncio.to_thread(Nodes, "API encoder", [url], connect, probe=ask_foreign_facts)
        async with pool as nodes:
            with pytest.raises(InvalidField):
                await ApiEncoderClient(nodes, None).encode(["A cat", " "], layer=-2, timeout_s=20.0)
            await eventually(lambda: server.gone == server.begun == 1)


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
