"""Write requirements.lock and requirements-test.lock from pyproject.toml, with uv (`make lock`).

Both hold for every platform and for Python 3.11 and newer: a line that is only for some of them carries a marker.
torch is one exact version, and the CUDA packages that its Linux wheel names are left out: torch brings the exact ones
that it wants where it is installed for a GPU, and `scripts/install.py` decides where that is. What this doesn't know:
which build of torch (CPU or CUDA) a machine needs, and where packages come from (no registry's address is written).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
CUDA_LINE = re.compile(r"^(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
MADE_BY = "# `make lock` (scripts/lock.py) wrote it from pyproject.toml; don't edit it by hand."


def find_uv() -> str:
    """uv from PATH, or the one that the installer put into .venv."""
    found = shutil.which("uv") or shutil.which("uv", path=str(ROOT / ".venv" / "bin"))
    if found is None:
        sys.exit("lock: uv is needed for this. Install it (python3 -m pip install uv), then run `make lock` again.")
    return found


def resolve(uv: str, what: list[str], constraints: Path) -> list[str]:
    """The newest versions of `what` that keep to the constraints, one line for each package."""
    command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--no-header"]
    command += ["--no-annotate", "--constraints", str(constraints), *what]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit("lock: uv found no set of versions (its words are above). Change pyproject.toml, then run it again.")
    return done.stdout.splitlines()


def without_torch(lines: list[str]) -> list[str]:
    """The lines without torch's own and without the CUDA packages that follow from it."""
    return [line for line in lines if line and not CUDA_LINE.match(line)]


def write(name: str, title: str, lines: list[str]) -> Path:
    """Write one lock file and say so."""
    path = ROOT / name
    path.write_text("\n".join([f"# {title}", MADE_BY, *lines]) + "\n", encoding="utf-8")
    print(f"lock: wrote {name}, {len(lines)} lines")
    return path


def main() -> None:
    """Resolve what users need first, then what the tests need on top, held to the same versions."""
    uv = find_uv()
    with tempfile.TemporaryDirectory() as scratch:
        pin = Path(scratch) / "torch.txt"
        pin.write_text(TORCH + "\n", encoding="utf-8")
        lines = resolve(uv, ["--extra", "all", "pyproject.toml"], pin)
    lines = sorted([*without_torch(lines), TORCH])
    lock = write("requirements.lock", "The exact version of every package that zimage needs.", lines)
    # The group alone: with pyproject.toml beside it, uv would add the project's own dependencies to it.
    tests = without_torch(resolve(uv, ["--group", "test"], lock))
    write("requirements-test.lock", "What the tests and checks need besides; it agrees with requirements.lock.", tests)


if __name__ == "__main__":
    main()
