"""Encoders as the gateway calls them: from our terms to HTTP and back."""

import asyncio
import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import ValidationError

from services.gateway.members import PROBE_TIMEOUT_S
from services.gateway.nodes import Nodes
from shared import wire
from shared.client import ServiceClient
from shared.errors import BadUpstream
from shared.schemas.encoder import FINGERPRINT, HiddenStates, Tokens
from shared.schemas.node import NodeFacts
from shared.tasks import all_of
from shared.wire import Header, TensorMeta, WireError

API_MAX_TOKENS = 40_960  # such servers cut at 512 unless told otherwise
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
class EncoderMessage:
    """An encoder's answer as it came, the embeddings in it, and the fingerprint of the model that they come from."""

    body: bytes
    items: tuple[Embeddings, ...]
    fingerprint: str


class Encoder(Protocol):
    """What turns texts into embeddings."""

    @property
    def nodes(self) -> Nodes:
        """Where it is done."""

    async def encode(self, texts: Sequence[str], *, layer: int, timeout_s: float) -> Encoding:
        """Hidden states `layer` of each text. Raises a ServiceError."""

    async def count_tokens(self, text: str, *, timeout_s: float) -> int:
        """How many tokens a text has. Raises a ServiceError."""


class EncoderClient:
    """Texts to embeddings and to token counts."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    async def encode(self, texts: Sequence[str], *, layer: int, timeout_s: float) -> Encoding:
        """Hidden states `layer` of each text. Raises a ServiceError."""
        started = time.perf_counter()
        message = await self.encode_message(texts, layer=layer, timeout_s=timeout_s)
        return Encoding(message.items, time.perf_counter() - started)

    async def encode_message(self, texts: Sequence[str], *, layer: int, timeout_s: float) -> "EncoderMessage":
        """The same with the bytes that they came in. Raises a ServiceError."""
        body = {"input": list(texts), "layer": layer}

        async def work(service: ServiceClient, left_s: float) -> EncoderMessage:
            headers = {"accept": wire.MEDIA_TYPE}
            reply = await service.post_json("/v1/hidden_states", body, timeout_s=left_s, headers=headers)
            return read_encoder_message(reply.body, len(texts))

        return await self.nodes.ask(work, timeout_s=timeout_s, kind="encode")

    async def count_tokens(self, text: str, *, timeout_s: float) -> int:
        """How many tokens the encoder makes of a text. Raises a ServiceError."""

        async def work(service: ServiceClient, left_s: float) -> int:
            reply = await service.post_json("/v1/tokenize", {"input": text}, timeout_s=left_s)
            try:
                return Tokens.model_validate_json(reply.body).counts[0]
            except (ValidationError, IndexError):
                raise BadUpstream("The encoder service answered something that is not tokens.") from None

        return await self.nodes.ask(work, timeout_s=timeout_s, kind="tokenize")


class ApiEncoderClient:
    """Texts to embeddings through another server's `/v1/hidden_states`: heylookitsanllm's JSON, or our encoder node.

    Its numbers come as float32 in base64, which are a tensor's bytes as they are; its endpoint takes a text at a time.
    """

    def __init__(self, nodes: Nodes, model: str | None) -> None:
        self.nodes = nodes
        self._model = model

    async def encode(self, texts: Sequence[str], *, layer: int, timeout_s: float) -> Encoding:
        """Hidden states `layer` of each text. Raises a ServiceError."""
        started = time.perf_counter()
        items = await all_of(self._encode(text, layer, timeout_s) for text in texts)
        return Encoding(tuple(items), time.perf_counter() - started)

    async def count_tokens(self, text: str, *, timeout_s: float) -> int:
        """How many tokens the other server makes of a text, counted by encoding it. Raises a ServiceError."""
        return (await self._encode(text, -2, timeout_s)).tokens

    async def _encode(self, text: str, layer: int, timeout_s: float) -> Embeddings:
        body = {
            "input": text,
            "model": self._model,
            "layer": layer,
            "max_length": API_MAX_TOKENS,
            "encoding_format": "base64",
        }

        async def work(service: ServiceClient, left_s: float) -> Embeddings:
            reply = await service.post_json("/v1/hidden_states", body, timeout_s=left_s)
            return await asyncio.to_thread(_read_api_answer, reply.body)

        return await self.nodes.ask(work, timeout_s=timeout_s, kind="encode")


async def ask_foreign_facts(service: ServiceClient) -> NodeFacts:
    """Whether a server that may be another program's answers at all; no more is known of it. Raises a ServiceError."""
    await service.get("/v1/models", timeout_s=PROBE_TIMEOUT_S)
    unknown = "unknown"
    return NodeFacts(service="encoder", version=unknown, name=unknown, device=unknown, dtype=unknown, fingerprint="")


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


def read_encoder_message(body: bytes, texts: int) -> EncoderMessage:
    """The encoder's answer for so many texts. Raises BadUpstream."""
    try:
        header = wire.parse_header(body)
        items = tuple(embeddings_of(body, header, f"hidden_states.{index}") for index in range(texts))
    except (WireError, KeyError):
        raise BadUpstream("The encoder service answered something that is not embeddings.") from None
    return EncoderMessage(body, items, header.metadata.get(FINGERPRINT, ""))
