"""Where the services' log lines go: a file for each service, and this process's terminal or standard error."""

import json
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path

import structlog

MAX_FILE_BYTES = 20 << 20
KEPT_FILES = 3


class Logbook:
    """Writes each line to `<folder>/<service>.log` as it came and, with `echo`, shows it: rendered on a terminal.

    A full disk or a terminal that is gone ends nothing: lines that cannot be written are dropped, which is told once.
    """

    def __init__(self, folder: Path, *, echo: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._echo = echo
        self._render = _terminal_rendering() if sys.stderr.isatty() else None
        self._files: dict[str, _File] = {}
        self._drops = False

    def write(self, service: str, line: str) -> None:
        """Takes one line of a service, without its end."""
        try:
            self._keep(service, line)
        except OSError as error:
            if not self._drops:
                self._show(f"log lines cannot be written to {self.folder} and are dropped: {error.strerror}")
            self._drops = True
        else:
            self._drops = False
        if self._echo:
            self._show(self._render(line) if self._render else line)

    def _keep(self, service: str, line: str) -> None:
        file = self._files.get(service)
        if file is None:
            file = self._files[service] = _File(
                self.folder / f"{service}.log", maxBytes=MAX_FILE_BYTES, backupCount=KEPT_FILES, encoding="utf-8"
            )
        file.emit(logging.LogRecord(service, logging.INFO, "", 0, line, None, None))

    @staticmethod
    def _show(text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


class _File(RotatingFileHandler):
    """A log file that raises what went wrong instead of printing a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Raises the error that is being handled."""
        del record
        raise  # noqa: PLE0704 - called while one is handled


def _terminal_rendering() -> Callable[[str], str]:
    renderer = structlog.dev.ConsoleRenderer(colors=True)

    def render(line: str) -> str:
        try:
            event = json.loads(line)
        except ValueError:
            return line
        if not isinstance(event, dict):
            return line
        event.pop("exception", None)  # the file has the trace; one line a happening is for the eye
        return str(renderer(None, "", event))

    return render
