"""What `/health` and `/api/nodes` tell of the services, from what their nodes answered last: nobody is asked for it."""

from collections.abc import Mapping, Sequence

from services.gateway.node import Node, NodeState
from services.gateway.nodes import Nodes
from services.gateway.store import History
from shared.schemas.health import NodeEntry, ServiceHealth


class Watch:
    """The services by their names, and Redis where there is a history.

    Without an `optional` service most requests can be answered. It is waited for at the start; when it goes away later
    this gateway stays ready.
    """

    def __init__(
        self, services: Mapping[str, Nodes], *, optional: Sequence[str] = (), history: History | None = None
    ) -> None:
        self._services = services
        self._optional = optional
        self._history = history

    @property
    def health(self) -> Mapping[str, ServiceHealth]:
        """Each service: ready with one of its nodes, else in the state of its first one."""
        told = {name: _health(nodes) for name, nodes in self._services.items()}
        if self._history is not None:
            told["redis"] = _health_of_redis(here=self._history.is_here)
        return told

    @property
    def nodes(self) -> list[NodeEntry]:
        """Every node of every service."""
        return [_entry(name, *pair) for name, nodes in self._services.items() for pair in nodes.all]

    def is_ready(self, name: str) -> bool:
        """Whether a node of the service can work."""
        return name in self._services and bool(self._services[name].ready)

    @property
    def complete(self) -> bool:
        """Whether every service is ready, and Redis there."""
        is_here = self._history is None or self._history.is_here
        return is_here and all(self.is_ready(name) for name in self._services)

    def unready_reason(self) -> str | None:
        """Which services are not ready without which this gateway is not, or None."""
        spared = [name for name in self._optional if name in self._services and self._services[name].model is not None]
        waiting = [name for name in self._services if not self.is_ready(name) and name not in spared]
        return f"waiting for {' and '.join(waiting)}" if waiting else None


def _health(nodes: Nodes) -> ServiceHealth:
    ready = nodes.ready
    spare = (NodeState.DRAINING, NodeState.OTHER_MODEL)  # told of only where there are no others
    node, state = min(nodes.all, key=lambda pair: (pair[0] not in ready, pair[1] in spare))
    return ServiceHealth(
        status="unreachable" if state in spare else state.value,
        url=node.service.base_url,
        reason=_reason(node, state),
        nodes=len(nodes.all),
        ready_nodes=len(ready),
    )


def _health_of_redis(*, here: bool) -> ServiceHealth:
    if here:
        return ServiceHealth(status="ready", nodes=1, ready_nodes=1)
    return ServiceHealth(status="unreachable", reason="pictures are made, but not kept", nodes=1)


def _entry(service: str, node: Node, state: NodeState) -> NodeEntry:
    facts = node.facts
    return NodeEntry(
        service=service,
        url=node.service.base_url,
        state=state.value,
        in_flight=node.in_flight,
        last_error=None if node.last_error is None else node.last_error.detail,
        version=facts.version if facts else None,
        device=facts.device if facts else None,
        model=facts.name if facts else None,
        fingerprint=facts.fingerprint if facts else None,
    )


def _reason(node: Node, state: NodeState) -> str | None:
    if state is NodeState.OTHER_MODEL:
        return "it has another model than most nodes of this service"
    if node.failure is not None:
        return node.failure.detail
    return None if node.asked else "it has not been asked yet"
