"""The gateway's view of the other services: one small class each, from our terms to HTTP and back."""

import asyncio
import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import ValidationError

from shared import wire
from shared.client import Reply, ServiceClient
from shared.errors import BadUpstream, ServiceError
from shared.schemas.diffusion import NEGATIVE, PARAMETERS, TEXT, THUMBNAIL_HEADER, DiffusionParameters
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
            items = tuple(_embeddings(reply, header, f"hidden_states.{index}") for index in range(len(texts)))
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

    async def generate(
        self, parameters: DiffusionParameters, text: Embeddings, negative: Embeddings | None, *, timeout_s: float
    ) -> Reply:
        """The PNG and its headers. The embeddings' bytes are sent as they came. Raises a ServiceError."""
        tensors = {TEXT: text} if negative is None else {TEXT: text, NEGATIVE: negative}
        header = wire.build_header(
            [TensorMeta(name, item.dtype, item.shape) for name, item in tensors.items()],
            {PARAMETERS: parameters.model_dump_json()},
        )
        chunks: list[bytes | memoryview] = [header, *(item.data for item in tensors.values())]
        reply = await self.service.post_chunks(
            "/v1/generate", chunks, timeout_s=timeout_s, headers={"content-type": wire.MEDIA_TYPE}
        )
        if not reply.body.startswith(PNG_SIGNATURE):
            raise BadUpstream("The diffusion service answered something that is not a PNG.")
        return reply


async def probe(service: ServiceClient, path: str = "/health/ready") -> ServiceError | None:
    """Asks a service whether it is ready; None when it is, else why not."""
    try:
        await service.get(path, timeout_s=PROBE_TIMEOUT_S)
    except ServiceError as error:
        return error
    return None


def thumbnail_of(reply: Reply) -> bytes:
    """The small JPEG that came with a picture, empty where there was none."""
    try:
        return base64.b64decode(reply.headers.get(THUMBNAIL_HEADER, ""), validate=True)
    except ValueError:
        return b""


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


def _embeddings(reply: Reply, header: Header, name: str) -> Embeddings:
    meta = header.tensor(name)
    span = header.span(name)
    if meta is None or len(meta.shape) != 2 or not all(meta.shape) or span.stop > len(reply.body):
        raise WireError(f"the tensor '{name}' is missing, empty, incomplete or not of rank 2")
    return Embeddings(meta.dtype, meta.shape, memoryview(reply.body)[span])
