"""The gateway's view of the other services: one small class each, from our terms to HTTP and back."""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, ValidationError

from shared import wire
from shared.client import ServiceClient
from shared.errors import BadUpstream, ServiceError
from shared.events import ERROR
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
from shared.schemas.encoder import HiddenStates, Tokens
from shared.wire import Header, TensorMeta, WireError

PROBE_TIMEOUT_S = 2.0
API_MAX_TOKENS = 40_960  # such servers cut at 512 unless told otherwise
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TORCH_NAMES = {"BF16": "torch.bfloat16", "F32": "torch.float32", "F16": "torch.float16"}


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One text's hidden states, unread: `data` are the bytes of a tensor of `shape` [tokens, width]."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def torch_dtype(self) -> str:
        """The dtype as torch prints it."""
        return _TORCH_NAMES.get(self.dtype, self.dtype)

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return self.shape[0]


@dataclass(frozen=True, slots=True)
class Encoding:
    """The embeddings of several texts, and the seconds that it took to get them."""

    items: tuple[Embeddings, ...]
    seconds: float


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


class BackEnd(Protocol):
    """A service as the watch sees it."""

    @property
    def service(self) -> ServiceClient:
        """The client that reaches it."""

    async def probe(self) -> ServiceError | None:
        """None when it is ready, else why not."""


class Encoder(BackEnd, Protocol):
    """What turns texts into embeddings."""

    async def encode(self, texts: Sequence[str], *, layer: int, timeout_s: float) -> Encoding:
        """Hidden states `layer` of each text. Raises a ServiceError."""

    async def count_tokens(self, text: str, *, timeout_s: float) -> int:
        """How many tokens a text has. Raises a ServiceError."""


class EncoderClient:
    """Texts to embeddings and to token counts."""

    def __init__(self, service: ServiceClient) -> None:
        self.service = service

    async def encode(self, texts: Sequence[str], *, layer: int, timeout_s: float) -> Encoding:
        """Hidden states `layer` of each text. Raises a ServiceError."""
        started = time.perf_counter()
        reply = await self.service.post_json(
            "/v1/hidden_states",
            {"input": list(texts), "layer": layer},
            timeout_s=timeout_s,
            headers={"accept": wire.MEDIA_TYPE},
        )
        try:
            header = wire.parse_header(reply.body)
            items = tuple(embeddings_of(reply.body, header, f"hidden_states.{index}") for index in range(len(texts)))
        except (WireError, KeyError):
            raise BadUpstream("The encoder service answered something that is not embeddings.") from None
        return Encoding(items, time.perf_counter() - started)

    async def probe(self) -> ServiceError | None:
        """Whether the service is ready; None when it is, else why not."""
        return await probe(self.service)

    async def count_tokens(self, text: str, *, timeout_s: float) -> int:
        """How many tokens the encoder makes of a text. Raises a ServiceError."""
        reply = await self.service.post_json("/v1/tokenize", {"input": text}, timeout_s=timeout_s)
        try:
            return Tokens.model_validate_json(reply.body).counts[0]
        except (ValidationError, IndexError):
            raise BadUpstream("The encoder service answered something that is not tokens.") from None


class ApiEncoderClient:
    """Texts to embeddings through another server's `/v1/hidden_states`: heylookitsanllm's JSON, or our encoder node.

    Its numbers come as float32 in base64, which are a tensor's bytes as they are; its endpoint takes a text at a time.
    """

    def __init__(self, service: ServiceClient, model: str | None) -> None:
        self.service = service
        self._model = model

    async def encode(self, texts: Sequence[str], *, layer: int, timeout_s: float) -> Encoding:
        """Hidden states `layer` of each text. Raises a ServiceError."""
        started = time.perf_counter()
        items = await asyncio.gather(*(self._encode(text, layer, timeout_s) for text in texts))
        return Encoding(tuple(items), time.perf_counter() - started)

    async def count_tokens(self, text: str, *, timeout_s: float) -> int:
        """How many tokens the other server makes of a text, counted by encoding it. Raises a ServiceError."""
        return (await self._encode(text, -2, timeout_s)).tokens

    async def probe(self) -> ServiceError | None:
        """Whether the server answers at all; None when it does."""
        return await probe(self.service, "/v1/models")

    async def _encode(self, text: str, layer: int, timeout_s: float) -> Embeddings:
        body = {
            "input": text,
            "model": self._model,
            "layer": layer,
            "max_length": API_MAX_TOKENS,
            "encoding_format": "base64",
        }
        reply = await self.service.post_json("/v1/hidden_states", body, timeout_s=timeout_s)
        return await asyncio.to_thread(_read_api_answer, reply.body)


class DiffusionClient:
    """Embeddings to a PNG."""

    def __init__(self, service: ServiceClient) -> None:
        self.service = service

    async def probe(self) -> ServiceError | None:
        """Whether the service is ready; None when it is, else why not."""
        return await probe(self.service)

    async def generate(self, commission: Commission, *, timeout_s: float) -> Drawn:
        """The picture. The embeddings' bytes are sent as they came. Raises a ServiceError."""
        reply = await self.service.post_chunks(
            "/v1/generate", commission.chunks(), timeout_s=timeout_s, headers={"content-type": wire.MEDIA_TYPE}
        )
        return _drawn(reply.body, reply.headers)

    async def follow(self, commission: Commission, *, timeout_s: float) -> AsyncGenerator[Progress | Drawn]:
        """What happens to the picture, which comes last. Closing the generator gives it up. Raises a ServiceError."""
        headers = {"content-type": wire.MEDIA_TYPE}
        stream = self.service.stream_chunks("/v1/generate", commission.chunks(), timeout_s=timeout_s, headers=headers)
        async with aclosing(stream) as events:
            async for event in events:
                if event.event == ERROR:
                    raise self.service.rebuilt(event.data.encode())
                done = event.event == DONE
                yield await asyncio.to_thread(_read_done, event.data) if done else _progress(event)

    async def cancel(self, request_id: str, *, timeout_s: float) -> None:
        """Gives up the pictures of a request. Raises UnknownName when there is none, or another ServiceError."""
        await self.service.delete(f"/v1/generate/{quote(request_id, safe='')}", timeout_s=timeout_s)

    async def loras(self, *, timeout_s: float) -> LoraList:
        """The LoRAs that pictures may have. Raises a ServiceError."""
        reply = await self.service.get("/v1/loras", timeout_s=timeout_s)
        try:
            return LoraList.model_validate_json(reply.body)
        except ValidationError:
            raise BadUpstream("The diffusion service answered something that is no list of LoRAs.") from None


async def probe(service: ServiceClient, path: str = "/health/ready") -> ServiceError | None:
    """Asks a service whether it is ready; None when it is, else why not."""
    try:
        await service.get(path, timeout_s=PROBE_TIMEOUT_S)
    except ServiceError as error:
        return error
    return None


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


def _read_api_answer(body: bytes) -> Embeddings:
    try:
        answer = HiddenStates.model_validate_json(body)
        data = base64.b64decode(str(answer.hidden_states), validate=True)
    except ValueError:  # ValidationError and binascii.Error are; so is what text beyond ASCII raises
        raise BadUpstream("The API encoder answered something that is not embeddings.") from None
    meta = TensorMeta("hidden_states", "F32", tuple(answer.shape))
    if len(meta.shape) != 2 or min(meta.shape) < 1 or meta.nbytes != len(data):
        raise BadUpstream("The API encoder's embeddings do not fit the shape that it names.")
    return Embeddings(meta.dtype, meta.shape, memoryview(data))


def embeddings_of(message: bytes, header: Header, name: str) -> Embeddings:
    """The tensor of that name, unread. Raises KeyError, and WireError where it cannot be embeddings."""
    meta = header.tensor(name)
    span = header.span(name)
    if meta is None or len(meta.shape) != 2 or not all(meta.shape) or span.stop > len(message):
        raise WireError(f"the tensor '{name}' is missing, empty, incomplete or not of rank 2")
    return Embeddings(meta.dtype, meta.shape, memoryview(message)[span])
