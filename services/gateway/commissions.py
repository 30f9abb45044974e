"""Pictures to be drawn: the diffusion service as the gateway calls it, from our terms to HTTP and back."""

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, ValidationError

from services.gateway.clients import Embeddings
from services.gateway.node import Node
from services.gateway.nodes import Nodes
from shared import wire
from shared.client import ServiceClient
from shared.errors import BadUpstream, QueueFull, UnknownName
from shared.events import ERROR
from shared.pictures import PNG_SIGNATURE
from shared.schemas.diffusion import (
    DONE,
    NEGATIVE,
    PARAMETERS,
    PROGRESS,
    TEXT,
    THUMBNAIL_HEADER,
    DiffusionParameters,
    Done,
    LoraList,
)
from shared.wire import TensorMeta


@dataclass(frozen=True, slots=True)
class Commission:
    """A picture to draw: its parameters, the embeddings of its texts, and those of its reference pictures."""

    parameters: DiffusionParameters
    text: Embeddings
    negative: Embeddings | None
    references: Sequence[Embeddings] = ()

    def chunks(self) -> list[bytes | memoryview]:
        """The message for the diffusion service. Fields that are as by default are left out: older nodes know fewer."""
        tensors = {TEXT: self.text} if self.negative is None else {TEXT: self.text, NEGATIVE: self.negative}
        tensors |= dict(zip(self.parameters.references, self.references, strict=True))
        header = wire.build_header(
            [TensorMeta(name, item.dtype, item.shape) for name, item in tensors.items()],
            {PARAMETERS: self.parameters.model_dump_json(exclude_defaults=True)},
        )
        return [header, *(item.data for item in tensors.values())]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture as it came, its small JPEG (empty where there is none), and how long each stage took."""

    png: bytes
    thumbnail: bytes
    server_timing: str


@dataclass(frozen=True, slots=True)
class Progress:
    """What happens to a picture: the event's name and fields, as the diffusion service told them."""

    name: str
    fields: BaseModel


@dataclass(slots=True)
class Errand:
    """Where a picture was sent so far: whether to any node at all, and to which that had no room for it."""

    sent: bool = False
    full: set[Node] = field(default_factory=set)


class DiffusionClient:
    """Embeddings to a PNG. An `errand` is for a picture that is sent more than once."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    async def generate(self, commission: Commission, *, timeout_s: float, errand: Errand | None = None) -> Drawn:
        """The picture. The embeddings' bytes are sent as they came. Raises a ServiceError."""
        headers = {"content-type": wire.MEDIA_TYPE}
        async with self._node(errand or Errand(), timeout_s) as (service, left_s):
            reply = await service.post_chunks("/v1/generate", commission.chunks(), timeout_s=left_s, headers=headers)
            return _drawn(reply.body, reply.headers)

    async def follow(
        self, commission: Commission, *, timeout_s: float, errand: Errand | None = None
    ) -> AsyncGenerator[Progress | Drawn]:
        """What happens to the picture, which comes last. Closing the generator gives it up. Raises a ServiceError.

        It must be followed from beginning to end by one task.
        """
        headers = {"content-type": wire.MEDIA_TYPE}
        async with self._node(errand or Errand(), timeout_s) as (service, left_s):
            stream = service.stream_chunks("/v1/generate", commission.chunks(), timeout_s=left_s, headers=headers)
            async with aclosing(stream) as events:
                async for event in events:
                    if event.event == ERROR:
                        raise service.rebuilt(event.data.encode())
                    done = event.event == DONE
                    yield await asyncio.to_thread(_read_done, event.data) if done else _progress(event)

    async def cancel(self, request_id: str, *, timeout_s: float) -> None:
        """Gives up the pictures of a request, on whichever nodes they are.

        Raises UnknownName when there are none, or another ServiceError.
        """
        path = f"/v1/generate/{quote(request_id, safe='')}"

        async def work(service: ServiceClient, left_s: float) -> None:
            await service.delete(path, timeout_s=left_s)

        answers = await self.nodes.ask_all(work, timeout_s=timeout_s)
        errors = [answer for answer in answers if answer is not None]
        if len(errors) == len(answers):
            raise next((error for error in errors if not isinstance(error, UnknownName)), errors[0])

    async def loras(self, *, timeout_s: float) -> LoraList:
        """The LoRAs that pictures may have. Raises a ServiceError."""

        async def work(service: ServiceClient, left_s: float) -> LoraList:
            reply = await service.get("/v1/loras", timeout_s=left_s)
            try:
                return LoraList.model_validate_json(reply.body)
            except ValidationError:
                raise BadUpstream("The diffusion service answered something that is no list of LoRAs.") from None

        return await self.nodes.ask(work, timeout_s=timeout_s, kind="loras")

    @asynccontextmanager
    async def _node(self, errand: Errand, timeout_s: float) -> AsyncIterator[tuple[ServiceClient, float]]:
        """A node, and the seconds that are left once there is one."""
        clock = asyncio.get_running_loop().time
        end = clock() + timeout_s
        async with self.nodes.lease(avoiding=errand.full, timeout_s=timeout_s) as node:
            errand.sent = True
            try:
                yield node.service, max(0.001, end - clock())
            except QueueFull:
                errand.full.add(node)
                raise


def _drawn(png: bytes, headers: Mapping[str, str]) -> Drawn:
    if not png.startswith(PNG_SIGNATURE):
        raise BadUpstream("The diffusion service answered something that is not a PNG.")
    try:
        thumbnail = base64.b64decode(headers.get(THUMBNAIL_HEADER, ""), validate=True)
    except ValueError:
        thumbnail = b""
    return Drawn(png, thumbnail, headers.get("server-timing", ""))


def _read_done(text: str) -> Drawn:
    try:
        done = Done.model_validate_json(text)
        png = base64.b64decode(done.image_b64, validate=True)
    except ValueError:  # ValidationError and binascii.Error are
        raise BadUpstream("The diffusion service answered something that is not a PNG.") from None
    return _drawn(png, httpx2.Headers(done.headers))


def _progress(event: httpx2.ServerSentEvent) -> Progress:
    try:
        return Progress(event.event, PROGRESS[event.event].model_validate_json(event.data))
    except (KeyError, ValidationError):
        raise BadUpstream("The diffusion service told something that is no event of a picture.") from None
