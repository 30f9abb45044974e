"""One server of real processes, on the tiny checkpoint, for all tests that leave it as they find it."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from servers import Running, serve


@pytest.fixture(scope="package")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`zimage serve`, ready."""
    with serve(tiny_checkpoint, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[httpx2.Client]:
    """A client of the server."""
    with server.client() as client:
        yield client


@pytest.fixture
def diffusion(server: Running) -> Iterator[httpx2.Client]:
    """A client of the server's diffusion service."""
    with server.service_client("diffusion") as client:
        yield client
