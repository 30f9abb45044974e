"""The gateway in an environment that holds only its own extra."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from servers import ROOT, free_port, run, running, wait_until

pytestmark = pytest.mark.slow
HEAVY = ("torch", "transformers", "diffusers", "accelerate", "tokenizers", "safetensors", "numpy", "PIL", "typer")
_OFFLINE = ("dns error", "connection error", "failed to fetch", "network", "connect", "no matching distribution")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with `.[gateway]`; skips where the package index cannot be reached."""
    folder = tmp_path_factory.mktemp("gateway-alone")
    interpreter = folder / "venv" / "bin" / "python"
    what = ["-c", str(ROOT / "requirements.lock"), f"{ROOT}[gateway]"]
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv:
        make = [uv, "venv", "--quiet", "--python", sys.executable, str(folder / "venv")]
        install = [uv, "pip", "install", "--quiet", "--python", str(interpreter), *what]
    else:
        make = [sys.executable, "-m", "venv", str(folder / "venv")]
        install = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
    made = run(make, folder)
    assert made.status == 0, made.stderr
    installed = run(install, folder, timeout_s=180)
    if installed.status and any(word in installed.stderr.lower() for word in _OFFLINE):
        pytest.skip(f"the packages cannot be fetched: {installed.stderr.strip().splitlines()[-1]}")
    assert installed.status == 0, installed.stderr
    return interpreter


def test_it_starts(python: Path, tmp_path: Path) -> None:
    port = free_port()
    with running([str(python), "-I", "-m", "services.gateway"], port, tmp_path, ZIMAGE_PORT=str(port)) as gateway:
        wait_until(gateway.is_live, "the gateway answers")
        with gateway.client() as client:
            assert client.get("/health/live").json() == {"status": "live"}
            assert len(client.get("/api/templates").json()["templates"]) >= 3
            assert client.get("/health/ready").status_code == 503


def test_nothing_heavy_is_there(python: Path, tmp_path: Path) -> None:
    code = f"import importlib.util, json; print(json.dumps([n for n in {HEAVY!r} if importlib.util.find_spec(n)]))"
    ended = run([str(python), "-I", "-c", code], tmp_path)
    assert json.loads(ended.stdout) == [], ended
