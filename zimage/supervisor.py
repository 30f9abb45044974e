"""Runs services as processes: starts them, starts them again when they crash, and stops them in order.

It binds their sockets itself, so a port is taken (or found taken) before anything loads and is kept over restarts. Its
end, even by SIGKILL, ends them: each holds the other end of a pipe that closes with this process.
"""

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import httpx2
import structlog

from services.gateway.settings import GatewaySettings
from shared.serving import EXIT_UNUSABLE, LIFELINE, SOCKET_FD
from shared.settings import read_settings
from zimage.logbook import Logbook
from zimage.plan import GATEWAY, REDIS, CannotStart, ServicePlan

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
HEALTHY_AFTER_S = 60.0  # a process that lived this long starts again after the first pause
STOP_MARGIN_S = 5.0  # beyond what the services give running requests
POLL_S = 0.1
KEPT_LINES = 50  # of a service's log, to find why it ended

log = structlog.get_logger(__name__)


class Supervisor:
    """Keeps the planned services running from `async with` until its end."""

    def __init__(self, plans: Sequence[ServicePlan], logbook: Logbook) -> None:
        self.plans = plans
        self._logbook = logbook
        stop_timeout_s = read_settings(GatewaySettings).shutdown_timeout_s + STOP_MARGIN_S
        self._services = [_Service(plan, logbook, stop_timeout_s) for plan in plans]
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def urls(self) -> dict[str, str]:
        """Where each service listens."""
        return {plan.name: plan.url for plan in self.plans}

    @property
    def pids(self) -> dict[str, int | None]:
        """The process of each service, None while there is none."""
        return {service.plan.name: service.pid for service in self._services}

    async def __aenter__(self) -> Self:
        """Starts every service."""
        self._keepers = [asyncio.create_task(service.keep(), name=service.plan.name) for service in self._services]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops the gateway, which waits for its running requests, then what those need, Redis last."""
        by_name = {service.plan.name: service for service in self._services}
        last = [by_name.pop(name) for name in (GATEWAY, REDIS) if name in by_name]
        for group in (last[:1], list(by_name.values()), last[1:]):
            await asyncio.gather(*(service.stop() for service in group))
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self._logbook.close()

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns once the gateway says that all is loaded. Raises CannotStart if a service gives up, or in the end."""
        url = f"{self.urls[GATEWAY]}/health/ready"
        async with httpx2.AsyncClient(trust_env=False, timeout=2.0) as client:
            ready = asyncio.create_task(_poll(client, url))
            await asyncio.wait((ready, *self._keepers), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            done = ready.done()
            ready.cancel()
        self._raise_failures()
        if not done:
            raise CannotStart(f"the services were not ready after {timeout_s:g} s; see {self._logbook.folder}")

    async def wait_failed(self) -> None:
        """Never returns while the services can be kept running; raises CannotStart when one cannot."""
        await asyncio.wait(self._keepers, return_when=asyncio.FIRST_COMPLETED)
        self._raise_failures()

    def _raise_failures(self) -> None:
        for keeper in self._keepers:
            if keeper.done() and not keeper.cancelled():
                keeper.result()


class _Service:
    """One process and its successors."""

    def __init__(self, plan: ServicePlan, logbook: Logbook, stop_timeout_s: float) -> None:
        self._stop_timeout_s = stop_timeout_s
        self.plan = plan
        self._logbook = logbook
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._last_lines = deque([""], maxlen=KEPT_LINES)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    async def keep(self) -> None:
        """Runs the process again whenever it ends, after growing pauses. Raises CannotStart if that is of no use."""
        pause_s = FIRST_PAUSE_S
        while not self._stopping.is_set():
            started = time.monotonic()
            exit_code = await self._run()
            if self._stopping.is_set():
                return
            if exit_code == EXIT_UNUSABLE:
                raise CannotStart(self._reason())
            if time.monotonic() - started > HEALTHY_AFTER_S:
                pause_s = FIRST_PAUSE_S
            log.error(
                "a service ended and is started again",
                name=self.plan.name,
                exit_code=exit_code,
                last_line=self._last_lines[-1],
                pause_s=pause_s,
            )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL for a process that does not end in time."""
        self._stopping.set()
        if self.plan.listener is not None:
            self.plan.listener.socket.close()  # or new clients would wait for a service that accepts no more
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self._stop_timeout_s)
        except TimeoutError:
            log.warning("a service did not stop in time and is killed", name=self.plan.name)
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _run(self) -> int:
        """Runs the process to its end and answers its exit status, or EX_OSERR where there was none."""
        environment = {**os.environ, **self.plan.environment, "ZIMAGE_LOG_FORMAT": "json", LIFELINE: "1"}
        descriptors = []
        if self.plan.listener is not None:
            descriptors.append(self.plan.listener.socket.fileno())
            environment[SOCKET_FD] = str(descriptors[0])
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.plan.command,
                stdin=asyncio.subprocess.PIPE,  # never written to: its end tells the service that we are gone
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=descriptors,
                env=environment,
                start_new_session=True,  # Ctrl-C on the terminal is for us; we stop the services in order
            )
        except OSError as error:  # no memory or no place for a process: there may be some later
            self._last_lines.append(f"no process could be started: {error.strerror}")
            return os.EX_OSERR
        await self._copy_lines(self._process)
        return await self._process.wait()

    async def _copy_lines(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        while True:
            try:
                raw = await process.stdout.readline()
            except ValueError:  # a line beyond the reader's limit: dropped, the rest is read on
                continue
            if not raw:
                return
            self._last_lines.append(raw.decode(errors="replace").rstrip())
            self._logbook.write(self.plan.name, self._last_lines[-1])

    def _reason(self) -> str:
        """The newest error with a reason, as requests may still be answered after it; else the last line."""
        for line in reversed(self._last_lines):
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("level") == "error" and isinstance(event.get("reason"), str):
                    return f"the {self.plan.name} service cannot start: {event['reason']}"
        return f"the {self.plan.name} service cannot start: {self._last_lines[-1]}"


async def _poll(client: httpx2.AsyncClient, url: str) -> None:
    while True:
        with suppress(httpx2.HTTPError):
            if (await client.get(url)).is_success:
                return
        await asyncio.sleep(POLL_S)
