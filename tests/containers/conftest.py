"""Images built from this tree, checkpoints that containers may read, and one server of containers for most tests.

These tests need Docker with Compose 2.24 or newer and are run by `make test-containers`. TORCH_INDEX_URL in the
environment is passed on to the build, as everywhere.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from docker_engine import BUILD_S, SERVICES, TAG, Project, docker, make_readable
from servers import free_port

SETTINGS = {
    "ZIMAGE_TAG": TAG,
    "TORCH_BUILD": "cpu",
    "OMP_NUM_THREADS": "1",  # with models this small a second thread only waits
}


@pytest.fixture(scope="session")
def images() -> Iterator[dict[str, str]]:
    """The images of all services, by service; built anew where the tree has changed."""
    docker("compose", "version")
    Project(SETTINGS, 0).compose("build", timeout_s=BUILD_S)
    yield {service: f"zimage-{service}:{TAG}" for service in SERVICES}
    docker("image", "rm", "--force", *(f"zimage-{service}:{TAG}" for service in SERVICES), check=False)


@pytest.fixture(scope="session")
def models(tiny_checkpoint: Path, tiny_vision_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny checkpoints `z-image` and `qwen3-vl`, which any user may read."""
    folder = tmp_path_factory.mktemp("mounted")
    shutil.copytree(tiny_checkpoint, folder / "z-image")
    shutil.copytree(tiny_vision_checkpoint, folder / "qwen3-vl")
    return make_readable(folder)


@pytest.fixture(scope="session")
def without_models(images: dict[str, str]) -> dict[str, str]:
    """What a server is told that shall draw with the bundled model."""
    assert images
    return SETTINGS


@pytest.fixture(scope="session")
def settings(without_models: dict[str, str], models: Path) -> dict[str, str]:
    """What every other server of these tests is told."""
    return {**without_models, "MODEL_PATH": str(models / "z-image"), "VL_MODEL_PATH": str(models / "qwen3-vl")}


@pytest.fixture(scope="module")
def server(settings: dict[str, str]) -> Iterator[Project]:
    """Everything that `docker compose up` starts, healthy. A test that takes something away brings it back."""
    project = Project(settings, free_port())
    try:
        project.up()
        yield project
    finally:
        project.down("--volumes", "--remove-orphans")


@pytest.fixture
def client(server: Project) -> Iterator[httpx2.Client]:
    """A client of the server."""
    with server.client() as client:
        yield client
