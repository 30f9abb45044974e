"""Runs a service's app as a process: its socket, its logs, its end.

A supervisor may hand over a listening socket (`ZIMAGE_SOCKET_FD`), so that the port outlives a restart, and its own
life (`ZIMAGE_LIFELINE=1`: standard input is a pipe that closes when the supervisor dies; this process then ends too).
"""

import importlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

import structlog
import uvicorn
from fastapi import FastAPI

from shared.logs import adopt_loggers, configure_logs
from shared.protocol import BoundedProtocol
from shared.settings import InvalidSettings, NodeSettings, ServiceSettings, read_settings

EXIT_UNUSABLE = 78  # EX_CONFIG of sysexits.h: starting again would fail again
SOCKET_FD = "ZIMAGE_SOCKET_FD"
LIFELINE = "ZIMAGE_LIFELINE"

S = TypeVar("S", bound=ServiceSettings)
log = structlog.get_logger(__name__)


def run_service(name: str, settings_type: type[S], module: str) -> None:
    """Runs a service until SIGTERM or Ctrl-C, then leaves the process with its exit status.

    `module` is where its `create_app(settings)` is. It is imported once the settings are known to be good, so that bad
    ones are told at once, and once logs have their form, as libraries log while they are imported.

    Exits with 0 after a clean stop, with `EXIT_UNUSABLE` when the settings or the model cannot be used.
    """
    settings, app = _build(name, settings_type, module)
    host, port = settings.address
    server = Server(
        uvicorn.Config(
            app,
            http=BoundedProtocol,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            backlog=512,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(settings.shutdown_timeout_s),
        )
    )
    app.state.stop = server.stop
    if os.environ.get(LIFELINE):
        threading.Thread(target=_end_with_supervisor, name="lifeline", daemon=True).start()
    server.run(sockets=_given_sockets())
    if not server.started and not server.exit_code:
        sys.exit(1)
    sys.exit(server.exit_code)


def _build(name: str, settings_type: type[S], module: str) -> tuple[S, FastAPI]:
    """Settings and app of a service; tells what cannot be used, and exits."""
    configure_logs(name)
    try:
        settings = read_settings(settings_type)
        configure_logs(name, log_format=settings.log_format, debug=settings.debug)
        if isinstance(settings, NodeSettings) and SOCKET_FD not in os.environ:  # a supervisor's sockets are its affair
            settings.require_token()
        create_app: Callable[[S], FastAPI] = importlib.import_module(module).create_app
        adopt_loggers()
        return settings, create_app(settings)
    except InvalidSettings as error:
        log.error("the settings cannot be used", reason=str(error))  # noqa: TRY400 - the sentence says it all
        sys.exit(EXIT_UNUSABLE)


class Server(uvicorn.Server):
    """uvicorn's server, which a part of the app may stop with an exit status and which ends with 0 on SIGTERM."""

    exit_code = 0

    def stop(self, exit_code: int) -> None:
        """Asks for an orderly stop. Safe to call from any thread."""
        self.exit_code = exit_code
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Stops in order; a second Ctrl-C at once. uvicorn's own would raise the signal again when all is done."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def _given_sockets() -> list[socket.socket] | None:
    descriptor = os.environ.get(SOCKET_FD)
    return [socket.socket(fileno=int(descriptor))] if descriptor else None


def _end_with_supervisor() -> None:
    while os.read(0, 1 << 10):  # nothing is ever written: the read ends when the supervisor does
        pass
    log.warning("the supervisor is gone, stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(10)  # a supervisor that was killed cannot wait for a long picture, nor should this process
    os._exit(1)
