"""What a caption says, read from the text's hidden states: makes the language model gather it in every token.

A colour's name stands in one token of fifty. A DiT with random weights sees the mean of them all, in which that token
is lost, and for thousands of steps it learns to draw without the text. After this stage a linear layer reads all that
a caption names from the mean of its hidden states, and the DiT follows it from the first hundred steps on.
"""

import random
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from demo_model import captions
from demo_model.captions import EVERYTHING, Said
from demo_model.training.loop import Losses, Schedule, run_stage
from demo_model.training.text import HIDDEN_LAYER, IGNORED, WIDTH, TextBatches, language_loss
from demo_model.world import Colour, Pattern, Place, Scene, Shape, Size, random_scene

SCHEDULE = Schedule(steps=400, learning_rate=1e-3, warmup=50)
BATCH = 48
LANGUAGE_WEIGHT = 0.05
MOST_THINGS = 2
QUESTIONS_OF_A_THING: tuple[type[StrEnum], ...] = (Colour, Shape, Place, Pattern, Size)
QUESTIONS: tuple[type[StrEnum], ...] = (Colour, *QUESTIONS_OF_A_THING * MOST_THINGS)
"""The background's colour, then what each thing is: a classifier for each."""


class FactReader(nn.Module):
    """Answers `QUESTIONS` from the mean hidden state of a caption."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(WIDTH, sum(len(kind) for kind in QUESTIONS))

    def forward(self, states: Tensor, said: Tensor) -> tuple[Tensor, ...]:
        """Logits of each question `[n, answers]`.

        Args:
            states: hidden states `[n, tokens, WIDTH]`, each token normed as the DiT norms it.
            said: bool `[n, tokens]`, False where `states` is only filling.
        """
        normed = nn.functional.rms_norm(states.float(), (WIDTH,)) * said[..., None]
        mean = normed.sum(1) / said.sum(1, keepdim=True)
        logits: tuple[Tensor, ...] = self.heads(mean).split([len(kind) for kind in QUESTIONS], dim=-1)
        return logits


def answers(scene: Scene, said: Said = EVERYTHING) -> list[int]:
    """The right answer to each question; `IGNORED` for a thing that the scene lacks, and for what a caption that says
    no more than `said` does not tell. (A pattern, a size and a single thing's place have a usual value.)"""
    right = [list(Colour).index(scene.background) if said.background else IGNORED]
    told = (said.colour, said.shape, said.place or len(scene.things) == 1, True, True)
    for thing in scene.things:
        values = (thing.colour, thing.shape, thing.place, thing.pattern, thing.size)
        right += [
            list(kind).index(value) if is_told else IGNORED
            for kind, value, is_told in zip(QUESTIONS_OF_A_THING, values, told, strict=True)
        ]
    return right + [IGNORED] * (len(QUESTIONS) - len(right))


def facts_loss(read: Sequence[Tensor], right: Tensor) -> Tensor:
    """Mean cross entropy of all that is known: logits of each question, and int64 `[n, questions]`."""
    wrong = [
        nn.functional.cross_entropy(logits, answer, ignore_index=IGNORED, reduction="sum")
        for logits, answer in zip(read, right.T, strict=True)
    ]
    return torch.stack(wrong).sum() / (right != IGNORED).sum().clamp_min(1)


def teach_facts(text: Qwen3ForCausalLM, texts: TextBatches, folder: Path, device: torch.device) -> FactReader:
    """Trains the language model further, on captions that name everything; answers what reads them."""
    torch.manual_seed(4)
    reader = FactReader().to(device)

    def losses(step: int) -> Losses:
        rng = random.Random(4_000_000 + step)
        scenes = [random_scene(rng) for _ in range(BATCH)]
        rows = [texts.prompt_ids(captions.caption(scene, EVERYTHING, rng)) for scene in scenes]
        tokens = texts.pad(rows, max(len(row) for row in rows))
        said = torch.arange(tokens.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]
        targets = torch.tensor([answers(scene) for scene in scenes]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            output = text(tokens.to(device), use_cache=False, output_hidden_states=True)
        read = reader(output.hidden_states[HIDDEN_LAYER], said.to(device))
        language = language_loss(output.logits, tokens.masked_fill(~said, IGNORED).to(device))
        return {"facts": facts_loss(read, targets), "caption": LANGUAGE_WEIGHT * language}

    run_stage("facts", {"text": text, "reader": reader}, SCHEDULE, losses, folder)
    return reader
