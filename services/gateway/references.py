"""Embeddings of reference pictures: the vl service as the gateway calls it, and the ids of what it extracts."""

import hashlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from pydantic import ValidationError

from services.gateway.clients import PROBE_TIMEOUT_S, Embeddings, embeddings_of
from services.gateway.written import RewriteEvent, follow, rewritten_of
from shared import wire
from shared.client import ServiceClient
from shared.errors import BadUpstream, ServiceError
from shared.schemas.fields import RequestModel
from shared.schemas.rewriter import Rewritten
from shared.schemas.vl import (
    EXTRACTED,
    IMAGE,
    PARAMETERS,
    STATES,
    DescribeParameters,
    Extracted,
    ExtractParameters,
    VlFacts,
)
from shared.wire import TensorMeta, WireError

_HASH_DIGITS = 16
_HEADERS = {"content-type": wire.MEDIA_TYPE}


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference picture's embeddings, the message that they came in, and what the vl service told of them."""

    message: bytes
    embeddings: Embeddings
    told: Extracted


class VlClient:
    """Pictures to hidden states, and to texts about them. `facts` are as the service told them last."""

    def __init__(self, service: ServiceClient) -> None:
        self.service = service
        self.facts: VlFacts | None = None

    async def probe(self) -> ServiceError | None:
        """Whether the service is ready; None when it is, else why not."""
        try:
            await self.ask_facts()
        except ServiceError as error:
            return error
        return None

    async def ask_facts(self) -> VlFacts:
        """What the service works with. Raises a ServiceError."""
        reply = await self.service.get("/v1/model", timeout_s=PROBE_TIMEOUT_S)
        try:
            self.facts = VlFacts.model_validate_json(reply.body)
        except ValidationError:
            raise BadUpstream("The vl service answered something that is no model.") from None
        return self.facts

    async def extract(self, picture: bytes, parameters: ExtractParameters, *, timeout_s: float) -> Reference:
        """The hidden states of a picture. Raises a ServiceError."""
        return read_reference(await self._post("/v1/extract", picture, parameters, timeout_s))

    async def describe(self, picture: bytes, parameters: DescribeParameters, *, timeout_s: float) -> Rewritten:
        """A text about a picture. Raises a ServiceError."""
        return rewritten_of(self.service, await self._post("/v1/describe", picture, parameters, timeout_s))

    def follow_description(
        self, picture: bytes, parameters: DescribeParameters, *, timeout_s: float
    ) -> AsyncGenerator[RewriteEvent | Rewritten]:
        """The same as it comes. Closing the generator ends the text. Raises a ServiceError."""
        chunks = _message(picture, parameters)
        events = self.service.stream_chunks("/v1/describe", chunks, timeout_s=timeout_s, headers=_HEADERS)
        return follow(self.service, events)

    async def _post(self, path: str, picture: bytes, parameters: RequestModel, timeout_s: float) -> bytes:
        chunks = _message(picture, parameters)
        reply = await self.service.post_chunks(path, chunks, timeout_s=timeout_s, headers=_HEADERS)
        return reply.body


def _message(picture: bytes, parameters: RequestModel) -> list[bytes]:
    metas = [TensorMeta(IMAGE, "U8", (len(picture),))]
    return [wire.build_header(metas, {PARAMETERS: parameters.model_dump_json()}), picture]


def read_reference(message: bytes) -> Reference:
    """The vl service's answer. Raises BadUpstream."""
    try:
        header = wire.parse_header(message)
        told = Extracted.model_validate_json(header.metadata.get(EXTRACTED, ""))
        return Reference(message, embeddings_of(message, header, STATES), told)
    except (WireError, KeyError, ValidationError):
        raise BadUpstream("The vl service answered something that is not embeddings.") from None


def id_of(picture: bytes, parameters: ExtractParameters, fingerprint: str) -> str:
    """`vl_<picture>_<text, flags and model>_L<layer>`: equal wherever and whenever equal things are extracted."""
    others = {**parameters.model_dump(exclude={"hidden_layer"}), "model": fingerprint}
    what = hashlib.sha256(json.dumps(others, sort_keys=True).encode())
    digits = [digest.hexdigest()[:_HASH_DIGITS] for digest in (hashlib.sha256(picture), what)]
    return f"vl_{'_'.join(digits)}_L{parameters.hidden_layer}"
