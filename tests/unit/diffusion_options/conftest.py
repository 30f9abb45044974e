"""What the tests of the options share: captured logs, a folder of LoRAs, a diffusers and a torch left as they were."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from diffusers.models import attention_dispatch
from drawing import load, load_pipeline
from lora_files import write_diffusers, write_original

from services.diffusion.model import ZImageModel


@pytest.fixture
def log_entries() -> Iterator[list[Any]]:
    """What is logged during the test."""
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A folder with three LoRAs, one of them in a folder of its own."""
    transformer = load_pipeline(tiny_checkpoint, torch.float32).transformer
    place = tmp_path / "loras"
    (place / "styles").mkdir(parents=True)
    for name, seed in (("ink", 0), ("oil", 1), ("styles/v1.0 chalk", 2)):
        shutil.move(write_original(tmp_path, transformer, seed=seed), place / f"{name}.safetensors")
    return place


@pytest.fixture
def plain(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> Path:
    """One more LoRA of the folder, `plain`, whose file has peft's settings and diffusers' own names."""
    transformer = load_pipeline(tiny_checkpoint, torch.float32).transformer
    return write_diffusers(tmp_path, transformer).rename(folder / "plain.safetensors")


@pytest.fixture
def model(tiny_checkpoint: Path, folder: Path) -> ZImageModel:
    """A model whose requests may choose among the LoRAs of the folder."""
    return load(tiny_checkpoint, lora_dir=folder)


@pytest.fixture
def restored_backend() -> Iterator[None]:
    """diffusers keeps the attention that was chosen last in a global of its own."""
    registry = attention_dispatch._AttentionBackendRegistry
    before = registry.get_active_backend()[0]
    yield
    registry.set_active_backend(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile keeps what it has compiled, by the code of the function."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
