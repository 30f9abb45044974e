"""`zimage serve`: the supervisor in the foreground, what it tells the operator, and its end by a signal."""

import asyncio
import signal
from pathlib import Path

import structlog
from rich.console import Console
from rich.table import Table

from services.gateway.settings import GatewaySettings
from shared.logs import configure_logs
from zimage.logbook import Logbook
from zimage.plan import GATEWAY, plan_services
from zimage.supervisor import Supervisor

READY_TIMEOUT_S = 1800.0  # a large model on a slow disk
DEMO_NOTICE = (
    "[yellow]No --model-path is given:[/] the bundled demo model draws, which knows simple shapes only. "
    "`zimage download` gets Z-Image-Turbo."
)
log = structlog.get_logger(__name__)


async def serve_until_stopped(settings: GatewaySettings) -> None:
    """Runs the planned services until SIGTERM or Ctrl-C. Raises CannotStart when they cannot run."""
    configure_logs("supervisor", debug=settings.debug)
    console = Console(stderr=True)
    if settings.model_path is None:
        console.print(DEMO_NOTICE)
    stop = _stop_event()
    plans = plan_services(settings)
    async with Supervisor(plans, Logbook(settings.data_dir / "logs", echo=True)) as supervisor:
        console.print(_addresses(supervisor, settings.data_dir))
        ready = asyncio.create_task(supervisor.wait_ready(READY_TIMEOUT_S))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((ready, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            ready.result()
            console.print(f"[bold green]Ready[/] {supervisor.urls[GATEWAY]} · try {supervisor.urls[GATEWAY]}/docs")
            failed = asyncio.create_task(supervisor.wait_failed())
            await asyncio.wait((failed, stopped), return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
            failed.cancel()
        ready.cancel()
        log.info("stopping")
    log.info("stopped")


def _stop_event() -> asyncio.Event:
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event


def _addresses(supervisor: Supervisor, data_dir: Path) -> Table:
    table = Table(title="Z-Image server", caption=f"logs in {data_dir / 'logs'}", title_justify="left")
    table.add_column("service")
    table.add_column("listens at")
    for name, url in supervisor.urls.items():
        table.add_row(name, url)
    return table
