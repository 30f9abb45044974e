"""Embeddings of reference pictures: the vl service as the gateway calls it, and the ids of what it extracts."""

import hashlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial

import httpx2
from pydantic import ValidationError

from services.gateway.clients import Embeddings, embeddings_of
from services.gateway.members import PROBE_TIMEOUT_S, ask_facts
from services.gateway.nodes import Nodes
from services.gateway.written import RewriteEvent, follow, rewritten_of
from shared import wire
from shared.client import ServiceClient
from shared.errors import BadUpstream
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
    """Pictures to hidden states, and to texts about them."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    @property
    def facts(self) -> VlFacts | None:
        """What the nodes told last of themselves."""
        facts = self.nodes.facts
        return facts if isinstance(facts, VlFacts) else None

    async def ask_facts(self) -> VlFacts:
        """What a node works with. Raises a ServiceError."""

        async def work(service: ServiceClient, _: float) -> VlFacts:
            return await ask_vl_facts(service)

        return await self.nodes.ask(work, timeout_s=PROBE_TIMEOUT_S)

    async def extract(self, picture: bytes, parameters: ExtractParameters, *, timeout_s: float) -> Reference:
        """The hidden states of a picture. Raises a ServiceError."""

        async def work(service: ServiceClient, left_s: float) -> Reference:
            return read_reference(await _post(service, "/v1/extract", picture, parameters, left_s))

        return await self.nodes.ask(work, timeout_s=timeout_s, kind="extract")

    async def describe(self, picture: bytes, parameters: DescribeParameters, *, timeout_s: float) -> Rewritten:
        """A text about a picture. Raises a ServiceError."""

        async def work(service: ServiceClient, left_s: float) -> Rewritten:
            return rewritten_of(service, await _post(service, "/v1/describe", picture, parameters, left_s))

        return await self.nodes.ask(work, timeout_s=timeout_s)

    def follow_description(
        self, picture: bytes, parameters: DescribeParameters, *, timeout_s: float
    ) -> AsyncGenerator[RewriteEvent | Rewritten]:
        """The same as it comes. Closing the generator ends the text. Raises a ServiceError."""

        def begin(service: ServiceClient) -> AsyncGenerator[httpx2.ServerSentEvent]:
            chunks = _message(picture, parameters)
            return service.stream_chunks("/v1/describe", chunks, timeout_s=timeout_s, headers=_HEADERS)

        return follow(self.nodes, begin)


ask_vl_facts = partial(ask_facts, "vl", kind=VlFacts)
"""What a node of the vl service says that it is. Raises a ServiceError."""


async def _post(service: ServiceClient, path: str, picture: bytes, parameters: RequestModel, timeout_s: float) -> bytes:
    chunks = _message(picture, parameters)
    return (await service.post_chunks(path, chunks, timeout_s=timeout_s, headers=_HEADERS)).body


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
