"""Where the services' log lines go: a file for each service, and this process's terminal or standard error."""

import json
import logging
import sys
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path

import structlog

MAX_FILE_BYTES = 20 << 20
KEPT_FILES = 3


class Logbook:
    """Writes each line to `<folder>/<service>.log` as it came and, with `echo`, shows it: rendered on a terminal."""

    def __init__(self, folder: Path, *, echo: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._echo = echo
        self._render = _terminal_rendering() if sys.stderr.isatty() else None
        self._files: dict[str, RotatingFileHandler] = {}

    def write(self, service: str, line: str) -> None:
        """Takes one line of a service, without its end."""
        file = self._files.get(service)
        if file is None:
            file = self._files[service] = RotatingFileHandler(
                self.folder / f"{service}.log", maxBytes=MAX_FILE_BYTES, backupCount=KEPT_FILES, encoding="utf-8"
            )
        file.emit(logging.LogRecord(service, logging.INFO, "", 0, line, None, None))
        if self._echo:
            sys.stderr.write((self._render(line) if self._render else line) + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


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
