"""Last stage: the DiT alone learns to draw what the finished text says.

The language model no longer changes, so a step costs half of one before, and more of them fit into the same time. They
look at the noisiest sigmas most, where only the text tells what will be drawn.

Beside the flow it learns what `reading` asks of its image tokens. Where it blends, half of the references are what the
vision-language model sees of them.
"""

import random
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from demo_model.render import render
from demo_model.seeing import Vision
from demo_model.training.dit import MULTIPLE, predict_and_show, use_real_rotation
from demo_model.training.joint import (
    SHIFT,
    SIZES,
    Learnt,
    Pools,
    blended_states,
    flow_loss,
    reference_states,
    token_rows,
)
from demo_model.training.latents import Example
from demo_model.training.loop import Losses, Schedule, run_stage
from demo_model.training.reading import PatchReader, reading_losses
from demo_model.training.text import HIDDEN_LAYER, TextBatches
from demo_model.world import Scene

SCHEDULE = Schedule(steps=31_500, learning_rate=1.6e-3)
IMAGES = {(128, 128): 32, (256, 256): 10}
"""Pictures of a batch by size; of the other sizes as many as make about as many tokens."""
IMAGES_OTHERS = 14
SMALLEST, LARGER = 0.35, 0.92  # the batches up to these shares are of 128x128 and of 256x256; other sizes fill the rest
BLENDED_SHARE = {(128, 128): 0.35, (256, 256): 0.3}  # of the batches of a size that show blended texts
SEEN = 0.5  # share of the references that are seen; the rest are read
PURE_NOISE = 0.2  # share of the examples at sigma 1
SIGMA_CENTER, SIGMA_SPREAD = 0.8, 1.1  # of the logistic normal that the others' sigma comes from, before the shift

See = Callable[[Scene], Tensor | None]
"""Hidden states of a picture of a scene, `[tokens, width]`; None for scenes that are read instead."""
Predict = Callable[[ZImageTransformer2DModel, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, list[Tensor]]]


def train_drawing(
    learnt: Learnt, dit: ZImageTransformer2DModel, batches: TextBatches, see: Vision, folder: Path, device: torch.device
) -> None:
    """Trains the DiT further in place; the language models and the VAE stay as they are."""
    torch.manual_seed(6)
    learnt.text.requires_grad_(requires_grad=False)
    use_real_rotation(dit)
    pools = Pools(learnt.vae, folder / "latents")
    reader = PatchReader().to(device)
    quick = _compiled()

    @cache
    def seen(reference: Scene) -> Tensor:
        return see.states(render(reference, width=256, height=256)).bfloat16()

    def losses(step: int) -> Losses:
        rng = random.Random(8_000_000 + step)
        size = _random_size(rng)
        blended = rng.random() < BLENDED_SHARE.get(size, 0.0)
        count = IMAGES.get(size, IMAGES_OTHERS)
        rows, examples, latents = _batch(pools, batches, rng, size, count, blended=blended)
        latents = latents.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                states, said = _read(
                    learnt, batches, rows, examples, lambda reference: seen(reference) if rng.random() < SEEN else None
                )
            sigma = _sigmas(rng, count).to(device)
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step)).to(device)
            spread = sigma[:, None, None, None]
            forward = quick if size in IMAGES and states.shape[1] <= 2 * MULTIPLE else predict_and_show
            output, shown = forward(dit, (1 - spread) * latents + spread * noise, 1 - sigma, states, said)
        flow = flow_loss(output.float(), latents, noise)
        return {"flow": flow, **reading_losses(reader, shown, examples, latents)}

    run_stage("drawing", {"dit": dit, "reader": reader}, SCHEDULE, losses, folder)


def _compiled() -> Predict:
    """`predict_and_show`, compiled where there is a compiler: nearly twice as fast for the shapes of most batches."""
    if shutil.which("c++") is None:
        return predict_and_show
    compiled: Any = torch.compile(predict_and_show, dynamic=False)
    return compiled  # type: ignore[no-any-return]


def _random_size(rng: random.Random) -> tuple[int, int]:
    kind = rng.random()
    if kind < SMALLEST:
        return SIZES[0]
    return SIZES[1] if kind < LARGER else rng.choice(SIZES[2:])


def _batch(
    pools: Pools, batches: TextBatches, rng: random.Random, size: tuple[int, int], count: int, *, blended: bool
) -> tuple[list[list[int]], list[Example], Tensor]:
    """Prompts as tokens, their examples and the latents: prompts that fill up to one length, so that little is filled.

    Of twice or more as many drawn examples those are kept that fill up as the first one does.
    """
    rows: list[list[int]] = []
    chosen: list[tuple[Example, Tensor]] = []
    while len(chosen) < count:
        examples, latents = pools.take(rng, size, 2 * count, blended=blended)
        for example, latent in zip(examples, latents, strict=True):
            row = batches.prompt_ids(example.prompt(rng))
            if blended or not rows or _filled(len(row)) == _filled(len(rows[0])):
                rows.append(row)
                chosen.append((example, latent))
    kept = chosen[:count]
    return rows[:count], [example for example, _ in kept], torch.stack([latent for _, latent in kept])


def _filled(length: int) -> int:
    return length + -length % MULTIPLE


def _read(
    learnt: Learnt, batches: TextBatches, rows: list[list[int]], examples: Sequence[Example], see: See
) -> tuple[Tensor, Tensor]:
    """Hidden states of the prompts `[n, tokens, width]` and which of them are said.

    A reference is what `see` answers for it, or else its words.
    """
    references, tokens, said = token_rows(batches, rows, examples)
    # hidden state -2 without the head, which would be most of the work
    model: Any = learnt.text.model
    states = model(tokens.to(model.device), use_cache=False, output_hidden_states=True).hidden_states[HIDDEN_LAYER]
    pulled_to = []
    for example, read in zip(examples, reference_states(states, rows, references), strict=False):
        seen = see(example.reference) if example.reference else None
        pulled_to.append(read if seen is None else seen)
    return blended_states(states, rows, pulled_to, examples), said[: len(rows)].to(states.device)


def _sigmas(rng: random.Random, count: int) -> Tensor:
    values = []
    for _ in range(count):
        base = torch.sigmoid(torch.tensor(rng.gauss(SIGMA_CENTER, SIGMA_SPREAD))).item()
        values.append(1.0 if rng.random() < PURE_NOISE else SHIFT * base / (1 + (SHIFT - 1) * base))
    return torch.tensor(values)
