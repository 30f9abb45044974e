"""The acceptance checks, as they stand, against a real server."""

import re
import sys
from pathlib import Path

import pytest
from servers import Running, run, shared_file

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("group", ["format.", "templates.", "generate.", "history.", "health.", "encode.", "rewrite."])
def test_conformance(server: Running, tmp_path: Path, group: str) -> None:
    script = shared_file("acceptance/conformance.py")
    command = [sys.executable, str(script), server.url, "--size", "64", "--only", group]
    ended = run(command, tmp_path, timeout_s=200)
    assert re.search(r"^[1-9]\d* passed, 0 failed, 0 skipped$", ended.stdout, re.MULTILINE), ended.stdout + ended.stderr
    assert ended.status == 0
