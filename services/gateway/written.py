"""What the services that write answer, as the gateway reads it: pieces as they come, and the whole."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import httpx2
from pydantic import ValidationError

from services.gateway.nodes import Nodes
from shared.client import ServiceClient
from shared.errors import BadUpstream
from shared.events import ERROR
from shared.schemas.rewriter import DONE, Rewritten


@dataclass(frozen=True, slots=True)
class RewriteEvent:
    """A piece of thinking or of a text, as the service sent it: `name` says which, `data` is JSON."""

    name: str
    data: str


def rewritten_of(service: ServiceClient, body: bytes) -> Rewritten:
    """The whole answer. Raises BadUpstream."""
    try:
        return Rewritten.model_validate_json(body)
    except ValidationError:
        raise BadUpstream(f"The {service.name} service answered something that is no text.") from None


Begin = Callable[[ServiceClient], AsyncGenerator[httpx2.ServerSentEvent]]
"""Asks a node for a text; its events come as they are."""


async def follow(nodes: Nodes, begin: Begin) -> AsyncGenerator[RewriteEvent | Rewritten]:
    """Pieces as they come from a node, then the whole. Closing the generator ends the text. Raises a ServiceError."""
    async with nodes.lease(movable=False) as node, aclosing(begin(node.service)) as events:
        service = node.service
        async for event in events:
            if event.event == ERROR:
                raise service.rebuilt(event.data.encode())
            if event.event == DONE:
                yield rewritten_of(service, event.data.encode())
                return
            yield RewriteEvent(event.event, event.data)
        raise BadUpstream(f"The {service.name} service ended its answer before the text was whole.")
