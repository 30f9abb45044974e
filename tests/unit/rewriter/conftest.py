"""The tiny language model, loaded once, and rewriters that write with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from language import load_language_model

from services.rewriter import local, model  # noqa: F401 - an app that writes by itself imports them, which blocks
from shared.language.model import LanguageModel


@pytest.fixture(scope="package")
def loaded(tiny_checkpoint: Path) -> LanguageModel:
    """The model."""
    return load_language_model(tiny_checkpoint)


@pytest.fixture
def language(loaded: LanguageModel) -> Iterator[LanguageModel]:
    """The model, writing nothing yet."""
    yield loaded
    loaded.batch.clear()


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    """What is logged does not reach the terminal."""
    with structlog.testing.capture_logs():
        yield
