"""`zimage.supervisor` and its logbook where the machine gives no process, or takes no more lines of logs."""

import asyncio
import errno
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog
from inprocess import eventually

from zimage.logbook import Logbook
from zimage.plan import ServicePlan
from zimage.supervisor import Supervisor


class Terminal(io.StringIO):
    """Standard error, which may be gone."""

    gone = False

    def write(self, text: str) -> int:
        if self.gone:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


def test_lines_that_cannot_be_written_are_dropped_and_that_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    book = Logbook(tmp_path, echo=True)
    book.write("encoder", "first")
    with monkeypatch.context() as patch:
        patch.setattr("logging.StreamHandler.flush", full)
        book.write("encoder", "second")
        book.write("encoder", "third")
    book.write("encoder", "fourth")
    book.close()
    assert terminal.getvalue().count("No space left on device") == 1
    assert "Traceback" not in terminal.getvalue()
    assert [line for line in terminal.getvalue().splitlines() if "dropped" not in line] == [
        "first",
        "second",
        "third",
        "fourth",
    ]
    assert {"first", "fourth"} <= set((tmp_path / "encoder.log").read_text().split())


def test_a_terminal_that_is_gone_takes_no_lines_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    terminal.gone = True
    book = Logbook(tmp_path, echo=True)
    book.write("encoder", "first")
    book.close()
    assert (tmp_path / "encoder.log").read_text() == "first\n"


async def test_a_process_that_cannot_be_started_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage.supervisor.FIRST_PAUSE_S", 0.01)
    start, tried = asyncio.create_subprocess_exec, 0

    async def scarce(*arguments: Any, **options: Any) -> Any:
        nonlocal tried
        tried += 1
        if tried < 3:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return await start(*arguments, **options)

    monkeypatch.setattr("asyncio.create_subprocess_exec", scarce)
    command = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)")
    plan = ServicePlan("gateway", command, "http://127.0.0.1:1")
    with structlog.testing.capture_logs() as log:
        book = await asyncio.to_thread(Logbook, tmp_path, echo=False)
        async with Supervisor([plan], book) as supervisor:
            await eventually(lambda: supervisor.pids["gateway"])
    ended = [entry for entry in log if "started again" in entry["event"]]
    assert len(ended) == 2
    assert "temporarily unavailable" in ended[0]["last_line"]
