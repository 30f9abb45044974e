"""A language model for tests: the tiny one, made to write texts that vary."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from shared.language.model import LanguageModel, load_qwen3
from shared.language.options import Message

PROMPTS = [
    "A cat",
    "A dog in the rain on a red bench",
    "x " * 40,
    "Two birds",
    "The sea at night, with a lighthouse",
    "两只猫",
    "a long street with many houses " * 12,
    "snow",
]
SHARPER = 4.0  # random weights of the usual size make every text the repetition of one token


def load_language_model(checkpoint: Path) -> LanguageModel:
    """The text encoder of a checkpoint as a model that writes, its matrices larger."""
    model, writes = load_qwen3(checkpoint / "text_encoder", device=torch.device("cpu"), dtype=torch.float32)
    assert writes
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(SHARPER)
    return LanguageModel(model, AutoTokenizer.from_pretrained(checkpoint / "tokenizer"), "tiny")


def prompt_ids(language: LanguageModel, prompt: str) -> list[int]:
    """The tokens of a conversation with this prompt."""
    return language.prompt([Message("user", prompt)]).ids


def generate(language: LanguageModel, ids: list[int], count: int) -> list[int]:
    """What transformers' `generate` writes greedily, its end token included."""
    model: Any = language.batch._model
    written = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=sorted(language.facts.ends),
        pad_token_id=0,
    )
    tokens: list[int] = written[0, len(ids) :].tolist()
    return tokens
