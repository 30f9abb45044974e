"""`python -m benchmarks.stub PORT [SECONDS]`: a node that answers at once what every request gets, or one request after
the other, each in so many seconds. It computes nothing: what is measured is what stands before it."""

import asyncio
import json
import sys

import uvicorn
from starlette.types import Receive, Scope, Send

from shared.schemas.encoder import FINGERPRINT
from shared.schemas.node import MODEL_PATH, NodeFacts
from shared.wire import MEDIA_TYPE, TensorMeta, build_header

TOKENS, WIDTH = 12, 64
FACTS = NodeFacts(service="encoder", version="0", name="stub", device="none", dtype="float32", fingerprint="stub")
_META = TensorMeta("hidden_states.0", "F32", (TOKENS, WIDTH))
ANSWERS = {
    "/v1/hidden_states": (build_header([_META], {FINGERPRINT: "stub"}) + bytes(_META.nbytes), MEDIA_TYPE),
    MODEL_PATH: (FACTS.model_dump_json().encode(), "application/json"),
    "/health/ready": (json.dumps({"status": "ready"}).encode(), "application/json"),
}


class Stub:
    """The node as an ASGI app; with `seconds` it encodes one request after the other, in so much time each."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._device = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        while (await receive()).get("more_body"):
            pass
        if self._seconds and scope["method"] == "POST":
            async with self._device:
                await asyncio.sleep(self._seconds)
        content, media_type = ANSWERS[scope["path"]]
        headers = [(b"content-type", media_type.encode()), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


def main() -> None:
    """The command line."""
    port, seconds = int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    uvicorn.run(Stub(seconds), host="127.0.0.1", port=port, lifespan="off", log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
