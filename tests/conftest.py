"""Checkpoints that many tests read, and the watch for calls that block the event loop."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from blockbuster import blockbuster_ctx
from checkpoints import make_quietly, make_vision_quietly
from hypothesis import settings

settings.register_profile("zimage", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("zimage")

torch.set_num_threads(1)  # for models this small a second thread only waits, the longer the busier the machine is

IN_PROCESS = ("unit", "contract")  # folders whose tests run the services' code in their own event loop


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Z-Image directory with random float32 weights. Read only: copy what a test would change."""
    return make_quietly(tmp_path_factory.mktemp("models") / "tiny", dtype="float32")


@pytest.fixture(scope="session")
def tiny_checkpoint_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture in bfloat16. Read only."""
    return make_quietly(tmp_path_factory.mktemp("models") / "tiny-bf16", dtype="bfloat16")


@pytest.fixture(scope="session")
def tiny_vision_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL directory with random float32 weights, as wide as the tiny text encoder. Read only."""
    return make_vision_quietly(tmp_path_factory.mktemp("models") / "tiny-vl", dtype="float32")


@pytest.fixture(scope="session")
def text_encoder(tiny_checkpoint: Path) -> Any:
    """The tiny checkpoint's `TextEncoder`, loaded once in float32."""
    from services.encoder.model import load_text_encoder
    from services.encoder.settings import EncoderSettings

    return load_text_encoder(EncoderSettings(model_path=tiny_checkpoint, text_encoder_device="cpu"))


@pytest.fixture(scope="session")
def vision_model(tiny_vision_checkpoint: Path) -> Any:
    """The tiny checkpoint's `VisionModel`, whose weights are loaded on demand."""
    from services.vl.loading import load_vision_model
    from services.vl.settings import VlSettings

    return load_vision_model(VlSettings(vl_model_path=tiny_vision_checkpoint))


@pytest.fixture(scope="session")
def zimage_model(tiny_checkpoint: Path) -> Any:
    """The tiny checkpoint's `ZImageModel`, loaded once in float32."""
    from services.diffusion.loading import load_zimage
    from services.diffusion.settings import DiffusionSettings

    return load_zimage(DiffusionSettings(model_path=tiny_checkpoint, dit_device="cpu", vae_device="cpu"))


@pytest.fixture(autouse=True)
def no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """A call of our code that blocks the event loop (files, sleep, sockets) is an error in an async test."""
    folders = request.node.path.relative_to(Path(__file__).parent).parts
    if folders[0] in IN_PROCESS and inspect.iscoroutinefunction(request.function):
        with blockbuster_ctx(["shared", "services"]):
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def clean_log_context() -> Iterator[None]:
    """What one test binds to the log's context, as a request does with its id, does not reach the next."""
    yield
    structlog.contextvars.clear_contextvars()
