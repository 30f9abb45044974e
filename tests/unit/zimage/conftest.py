"""The command line, called in this process, and the settings that it reads."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_server import Command

from tests.servers import free_port
from zimage.__main__ import main


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `zimage` with these arguments as its console script does, and answers the exit status."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "ZIMAGE_URL"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["zimage", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return call


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """No setting but a data directory and a free port of the test; what a command sets is taken back."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("ZIMAGE_"):
                patch.delenv(name)
        before = dict(os.environ)
        patch.setenv("ZIMAGE_DATA_DIR", str(tmp_path / "data"))
        patch.setenv("ZIMAGE_PORT", str(free_port()))
        patch.setenv("COLUMNS", "200")
        yield patch
        for name in set(os.environ) - set(before):
            del os.environ[name]
