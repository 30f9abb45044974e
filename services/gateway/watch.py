"""Watches whether the services are ready, so that `/health` answers from memory however busy they are."""

import asyncio
from collections.abc import Mapping

import structlog

from services.gateway.clients import probe
from shared.client import ServiceClient
from shared.errors import Unready
from shared.schemas.public import ServiceHealth

INTERVAL_S = 1.0
READY = "ready"
log = structlog.get_logger(__name__)


class Watch:
    """Probes each service every `INTERVAL_S` seconds and remembers the answer."""

    def __init__(self, services: Mapping[str, ServiceClient]) -> None:
        self._services = services
        self._health = {
            name: ServiceHealth(status="starting", url=service.base_url, reason="it has not been asked yet")
            for name, service in services.items()
        }

    @property
    def health(self) -> Mapping[str, ServiceHealth]:
        """The last answer of each service."""
        return self._health

    def is_ready(self, name: str) -> bool:
        """Whether the service was ready when it was last asked."""
        return self._health[name].status == READY

    def unready_reason(self) -> str | None:
        """Which services are not ready, or None."""
        waiting = [name for name in self._services if not self.is_ready(name)]
        return f"waiting for {' and '.join(waiting)}" if waiting else None

    async def run(self) -> None:
        """Probes until cancelled, every service on its own so that a silent one delays no other."""
        async with asyncio.TaskGroup() as tasks:
            for name in self._services:
                tasks.create_task(self._follow(name))

    async def _follow(self, name: str) -> None:
        while True:
            await self._probe(name)
            await asyncio.sleep(INTERVAL_S)

    async def _probe(self, name: str) -> None:
        service = self._services[name]
        error = await probe(service)
        before = self._health[name].status
        if error is None:
            health = ServiceHealth(status=READY, url=service.base_url)
        else:
            status = "starting" if isinstance(error, Unready) else "unreachable"
            health = ServiceHealth(status=status, url=service.base_url, reason=error.detail)
        self._health[name] = health
        if health.status != before:
            log.info("service changed", name=name, status=health.status, reason=health.reason)
