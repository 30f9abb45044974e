"""An encoder and a diffusion node, each a process of its own, as on two machines."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
from servers import Running, free_port, running, zimage


@pytest.fixture(scope="package")
def nodes(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Running]]:
    """`zimage node encoder` and `zimage node diffusion`, both ready."""
    data_dir = tmp_path_factory.mktemp("nodes")
    started = {}
    with ExitStack() as stack:
        for kind in ("encoder", "diffusion"):
            port = free_port()
            command = zimage("node", kind, "--model-path", tiny_checkpoint, "--port", str(port))
            started[kind] = stack.enter_context(running(command, port, data_dir))
        for node in started.values():
            node.wait_ready()
        yield started


@pytest.fixture
def encoder(nodes: dict[str, Running]) -> Iterator[httpx2.Client]:
    """A client of the encoder."""
    with nodes["encoder"].client() as client:
        yield client


@pytest.fixture
def diffusion(nodes: dict[str, Running]) -> Iterator[httpx2.Client]:
    """A client of the diffusion service."""
    with nodes["diffusion"].client() as client:
        yield client
