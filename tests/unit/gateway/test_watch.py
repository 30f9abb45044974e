"""The watch over the services: what a probe that breaks means."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import pytest
from inprocess import eventually
from structlog.testing import capture_logs

from services.gateway.rewriting import RewriterClient
from services.gateway.watch import Watch
from shared.client import ServiceClient
from shared.errors import ServiceError


class Breaking(RewriterClient):
    """A service whose next probes raise what is given; then it is there."""

    def __init__(self, service: ServiceClient, *errors: BaseException) -> None:
        super().__init__(service)
        self.errors = list(errors)
        self.asked = 0

    async def probe(self) -> ServiceError | None:
        self.asked += 1
        if self.errors:
            raise self.errors.pop()
        return None


@pytest.fixture
def service() -> ServiceClient:
    return ServiceClient("rewriter", "http://rewriter", max_reply_bytes=1)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("services.gateway.watch.INTERVAL_S", 0.001)
    yield


async def test_a_probe_that_breaks_ends_no_watch(service: ServiceClient) -> None:
    broken, whole = Breaking(service, *[ValueError("secret")] * 50), Breaking(service)
    watch = Watch({"rewriter": broken, "vl": whole})
    with capture_logs() as logs:
        watching = asyncio.create_task(watch.run())
        await eventually(lambda: broken.asked > 2)
        assert watch.health["rewriter"].status == "unreachable"
        assert "secret" not in str(watch.health["rewriter"].reason)
        await eventually(lambda: watch.complete)
        assert whole.asked > 2
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    told = [entry for entry in logs if entry["event"] == "a service could not be asked"]
    assert (len(told), told[0]["name"], told[0]["exc_info"]) == (50, "rewriter", True)


async def test_a_watch_that_is_cancelled_ends(service: ServiceClient) -> None:
    watch = Watch({"rewriter": Breaking(service, asyncio.CancelledError())})
    watching = asyncio.create_task(watch.run())
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    assert not watch.complete
