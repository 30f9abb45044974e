"""What the tests of the options share: captured logs, and a diffusers and a torch left as they were."""

from collections.abc import Iterator
from typing import Any

import pytest
import structlog
import torch
from diffusers.models import attention_dispatch


@pytest.fixture
def log_entries() -> Iterator[list[Any]]:
    """What is logged during the test."""
    with structlog.testing.capture_logs() as entries:
        yield entries


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
