"""The gateway starts where no tensor library is installed."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "diffusers", "accelerate", "tokenizers", "safetensors", "numpy", "PIL", "peft")
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))"  # None there makes an import fail
MAKE_APP = """
from services.gateway.app import create_app
from services.gateway.settings import GatewaySettings
app = create_app(GatewaySettings())
assert "/api/generate" in app.openapi()["paths"]
assert not [name for name in sys.modules if name.partition(".")[0] in HEAVY and sys.modules[name] is not None]
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_the_app_is_made_without_them() -> None:
    done = run(f"{BLOCK}\nHEAVY = {HEAVY!r}\n{MAKE_APP}")
    assert done.returncode == 0, done.stderr


def test_nothing_heavy_is_imported_where_it_is_installed() -> None:
    done = run(f"import sys\nHEAVY = {HEAVY!r}\n{MAKE_APP}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["shared.tensors", "services.encoder.model", "services.diffusion.model"])
def test_the_block_blocks(module: str) -> None:
    done = run(f"{BLOCK}\nimport {module}")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr
