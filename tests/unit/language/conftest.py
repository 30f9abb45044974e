"""The tiny language model, loaded once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from language import load_language_model

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
