"""Watches whether the services are ready, so that `/health` answers from memory however busy they are."""

import asyncio
from collections.abc import Mapping, Sequence

import structlog

from services.gateway.clients import BackEnd
from shared.errors import ServiceError, Unreachable, Unready
from shared.schemas.public import ServiceHealth

INTERVAL_S = 1.0
READY = "ready"
log = structlog.get_logger(__name__)


class Watch:
    """Probes each service every `INTERVAL_S` seconds and remembers the answer.

    Without an `optional` service most requests can be answered. It is waited for at the start; when it goes away later
    this gateway stays ready.
    """

    def __init__(self, back_ends: Mapping[str, BackEnd], *, optional: Sequence[str] = ()) -> None:
        self._back_ends = back_ends
        self._optional = optional
        self._seen: set[str] = set()  # services that were ready once
        self._health = {
            name: ServiceHealth(status="starting", url=back_end.service.base_url, reason="it has not been asked yet")
            for name, back_end in back_ends.items()
        }

    @property
    def health(self) -> Mapping[str, ServiceHealth]:
        """The last answer of each service."""
        return self._health

    def is_ready(self, name: str) -> bool:
        """Whether the service was ready when it was last asked."""
        return name in self._health and self._health[name].status == READY

    @property
    def complete(self) -> bool:
        """Whether every service is ready."""
        return all(self.is_ready(name) for name in self._back_ends)

    def unready_reason(self) -> str | None:
        """Which services are not ready without which this gateway is not, or None."""
        spared = self._seen.intersection(self._optional)
        waiting = [name for name in self._back_ends if not self.is_ready(name) and name not in spared]
        return f"waiting for {' and '.join(waiting)}" if waiting else None

    async def run(self) -> None:
        """Probes until cancelled, every service on its own so that a silent one delays no other."""
        async with asyncio.TaskGroup() as tasks:
            for name in self._back_ends:
                tasks.create_task(self._follow(name))

    async def _follow(self, name: str) -> None:
        while True:
            await self._probe(name)
            await asyncio.sleep(INTERVAL_S)

    async def _probe(self, name: str) -> None:
        back_end = self._back_ends[name]
        url, error = back_end.service.base_url, await _asked(name, back_end)
        before = self._health[name].status
        if error is None:
            health = ServiceHealth(status=READY, url=url)
            self._seen.add(name)
        else:
            status = "starting" if isinstance(error, Unready) else "unreachable"
            health = ServiceHealth(status=status, url=url, reason=error.detail)
        self._health[name] = health
        if health.status != before:
            log.info("service changed", name=name, status=health.status, reason=health.reason)


async def _asked(name: str, back_end: BackEnd) -> ServiceError | None:
    """What the service's probe answers. One that breaks is told as unreachable, so that the watch goes on."""
    try:
        return await back_end.probe()
    except Exception:  # whatever it was: without the watch this gateway would stay as ready as it was for ever
        log.exception("a service could not be asked", name=name)
        return Unreachable("It could not be asked; the gateway's log has the cause.")
