"""The vision-language model of the tiny checkpoint as transformers has it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration


@pytest.fixture(scope="session")
def theirs(tiny_vision_checkpoint: Path) -> Any:
    """transformers' own model."""
    return Qwen3VLForConditionalGeneration.from_pretrained(tiny_vision_checkpoint, dtype=torch.float32).eval()
