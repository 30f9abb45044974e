"""The nodes of one service: which there are, what each is, and which of them can work. Sends no requests but probes.

A base URL is a node; a host name with several addresses is several. Each is asked every second what it is, by
`GET /v1/model`. One that refuses, is silent or answers garbage does not count as ready until it has answered such a
question again, asked after growing pauses. All that are ready have the same model.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Self, TypeVar

import structlog
from pydantic import ValidationError

from services.gateway.lookup import Host, Resolve, resolve
from services.gateway.node import Node, NodeState
from shared.client import ServiceClient
from shared.errors import BadUpstream, ServiceError, Unreachable, Unready, UpstreamTimeout
from shared.schemas.node import MODEL_PATH, NodeFacts

PROBE_TIMEOUT_S = 2.0
LOOKUP_S = 2.0

F = TypeVar("F", bound=NodeFacts)
Connect = Callable[[str, str | None], ServiceClient]
"""Makes the client of a base URL, at one address of its host or, with None, wherever that is looked up to be."""
Probe = Callable[[ServiceClient], Awaitable[NodeFacts]]
"""Asks a node what it is. Raises a ServiceError."""
log = structlog.get_logger(__name__)


class Members:
    """The nodes of a service, which are followed from `async with` until its end."""

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        connect: Connect,
        *,
        probe: Probe | None = None,
        resolve: Resolve = resolve,
    ) -> None:
        self.name = name
        self.model: str | None = None
        self._connect = connect
        self._probe = probe or partial(ask_facts, name, kind=NodeFacts)
        self._hosts = [Host(url, resolve) for url in urls]
        self._nodes: dict[tuple[str, str | None], Node] = {(url, None): Node(connect(url, None)) for url in urls}
        self._tasks: dict[object, asyncio.Task[None]] = {}
        self._movable: dict[asyncio.Timeout, Node] = {}
        self._changed = asyncio.Event()
        self._states: dict[Node, NodeState] = {}
        self._last_ready_at = float("-inf")

    async def __aenter__(self) -> Self:
        """Begins to follow the nodes."""
        for node in self._nodes.values():
            await self._begin(node)
        for host in self._hosts:
            if host.is_name:
                self._tasks[host] = asyncio.create_task(self._look_up(host), name=f"{self.name} lookup")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends every connection."""
        for host in self._hosts:
            host.close()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for node in self._nodes.values():
            await node.service.__aexit__()

    @property
    def all(self) -> Sequence[tuple[Node, NodeState]]:
        """Every node and its state, in the order of the settings."""
        return [(node, node.state(self.model)) for node in self._nodes.values()]

    @property
    def ready(self) -> list[Node]:
        """The nodes that can work."""
        return [node for node in self._nodes.values() if node.state(self.model) is NodeState.READY]

    @property
    def facts(self) -> NodeFacts | None:
        """What the nodes of this pool's model say of themselves; None before one has answered."""
        known = [node.facts for node in self._nodes.values() if node.facts is not None]
        return next((facts for facts in known if facts.fingerprint == self.model), None)

    async def until_ready(self, timeout_s: float) -> None:
        """Returns once a node can work, or when the time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._usable():
                    await self._changed.wait()

    def _usable(self) -> list[Node]:
        """The ready nodes; before the first has answered, those that have not been asked yet."""
        if self.model is not None:
            return self.ready
        return self.ready or [node for node in self._nodes.values() if not (node.asked or node.leaving)]

    def _away(self) -> ServiceError:
        """Why no node can work."""
        failures = [node.failure for node in self._nodes.values() if node.failure is not None]
        if not failures:
            return Unready(f"The {self.name} service has not answered yet.", retry_after_s=2)
        kind = Unreachable if isinstance(failures[0], UpstreamTimeout) else type(failures[0])
        return kind(failures[0].detail, retry_after_s=2)

    async def _begin(self, node: Node) -> None:
        await node.service.__aenter__()
        self._tasks[node] = asyncio.create_task(self._follow(node), name=f"{self.name} node")

    async def _follow(self, node: Node) -> None:
        """Asks the node again and again what it is; ends when it has left and its last request is answered."""
        while not node.leaving or node.in_flight:
            await self._ask_node(node)
            self._review()
            await node.until_due()
        self._nodes = {key: other for key, other in self._nodes.items() if other is not node}
        self._tasks.pop(node, None)
        await node.service.__aexit__()

    async def _ask_node(self, node: Node) -> None:
        began_at = _now()
        try:
            node.answered(await self._probe(node.service), began_at)
        except ServiceError as error:
            node.was_silent(error)
        except Exception:  # the last line of defence: whatever it was, the node is asked again
            log.exception("a node could not be asked", service=self.name, url=node.service.base_url)
            node.was_silent(BadUpstream(f"The {self.name} service could not be asked."))

    async def _look_up(self, host: Host) -> None:
        while True:
            if await host.look_up():
                await self._renew(host)
            await asyncio.sleep(LOOKUP_S)

    async def _renew(self, host: Host) -> None:
        """Adds the nodes of the host's new addresses, and lets those that are gone finish what they have."""
        for (url, address), node in self._nodes.items():
            if url == host.url:
                node.leaving = address not in host.addresses
        for address in host.addresses:
            key = host.url, address
            if key not in self._nodes:
                service = await asyncio.to_thread(self._connect, *key)  # reads the machine's certificates
                self._nodes[key] = Node(service)
                await self._begin(self._nodes[key])
        self._review()

    def _review(self) -> None:
        """After a node's answer or failure: chooses the model, tells what changed, moves what hangs at lost nodes."""
        self._choose_model()
        states = dict(self.all)
        for node, state in states.items():
            if self._states.get(node) is not state:
                _tell(self.name, node, state)
        self._states = states
        ready = self.ready
        if ready:
            self._last_ready_at = _now()
        for scope, node in [*self._movable.items()]:
            if node.lost and any(other is not node for other in ready):
                del self._movable[scope]
                scope.reschedule(_now())
        self._changed.set()
        self._changed = asyncio.Event()

    def _choose_model(self) -> None:
        """The model of most nodes; of equally many the one so far, else the one that is named first."""
        votes = Counter(node.model for node in self._nodes.values() if node.model is not None and not node.leaving)
        if not votes:
            return
        most = [model for model, count in votes.items() if count == max(votes.values())]
        if self.model not in most:
            if self.model is not None:
                log.warning("the nodes have another model now", service=self.name, before=self.model, now=most[0])
            self.model = most[0]


async def ask_facts(name: str, service: ServiceClient, *, kind: type[F]) -> F:
    """What a node of the service `name` says that it is. Raises a ServiceError."""
    reply = await service.get(MODEL_PATH, timeout_s=PROBE_TIMEOUT_S)
    try:
        facts = kind.model_validate_json(reply.body)
    except ValidationError:
        raise BadUpstream(f"The {name} service answered something that is no model.") from None
    if facts.service != name:
        raise BadUpstream(f"There is no {name} service, but a node of another kind.")
    return facts


def _tell(service: str, node: Node, state: NodeState) -> None:
    told = log.warning if state in (NodeState.UNREACHABLE, NodeState.OTHER_MODEL) else log.info
    reason = None if node.failure is None else node.failure.detail
    model = None if node.facts is None else node.facts.fingerprint
    told("node", of=service, url=node.service.base_url, state=state.value, reason=reason, model=model)


def _now() -> float:
    return asyncio.get_running_loop().time()
