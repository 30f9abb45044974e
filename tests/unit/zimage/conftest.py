"""The command line, called in this process."""

import sys

import pytest
from scripted_server import Command

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
