"""Fourth stage: the DiT alone learns to draw what the finished text says.

The language model no longer changes, so a step costs half of one before, and more of them fit into the same time. They
look at the noisiest sigmas most, where only the text tells what will be drawn.

Beside the flow, linear layers learn to read from the image tokens which thing a patch belongs to, and the outline of
what the text asks for: so small a part of the flow's error, and in other colours each time, that without them the DiT
had not begun to take shapes from the text after 6,000 steps. A third one reads where in the picture a patch is: tokens
know that only by the turns between them and the text, and an outline can be no sharper than what they know of it.
"""

import math
import random
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from demo_model.render import render
from demo_model.training.dit import DIM, MULTIPLE, PATCH, predict_and_show, use_real_rotation
from demo_model.training.facts import QUESTIONS_OF_A_THING, facts_loss
from demo_model.training.joint import (
    SHIFT,
    SIZES,
    Learnt,
    Pools,
    belongs_to_things,
    blended_states,
    flow_loss,
    token_rows,
    told,
)
from demo_model.training.latents import Example
from demo_model.training.loop import Losses, Schedule, run_stage
from demo_model.training.text import HIDDEN_LAYER, TextBatches
from demo_model.world import RGB, Colour, Place, Scene, Shape, Size, Thing

SCHEDULE = Schedule(steps=15_500, learning_rate=1.6e-3)
IMAGES = {(128, 128): 32, (256, 256): 10}
"""Pictures of a batch by size; of the other sizes as many as make about as many tokens."""
IMAGES_OTHERS = 14
SMALLEST, LARGER = 0.35, 0.92  # the batches up to these shares are of 128x128 and of 256x256; other sizes fill the rest
BLENDED = 0.1  # share of the batches of 128x128 that show blended texts
PURE_NOISE = 0.2  # share of the examples at sigma 1
SIGMA_CENTER, SIGMA_SPREAD = 0.8, 1.1  # of the logistic normal that the others' sigma comes from, before the shift
READ_AFTER = (1, 2, 3)  # layers, from 0, whose image tokens are read; those after them draw what is known
PLACED_AFTER = (0, 1, 2)  # layers whose image tokens are to know where they are
THINGS_WEIGHT, OUTLINES_WEIGHT, POSITIONS_WEIGHT = 0.3, 2.0, 0.3
WAVES = 6  # of growing frequency along each axis: what positions are told by
CELLS = 4  # a patch's outline is told in so many rows and columns
PATCH_PX = 8 * PATCH

Predict = Callable[[ZImageTransformer2DModel, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, list[Tensor]]]


class ThingReader(nn.Module):
    """Answers `QUESTIONS_OF_A_THING` from the image tokens after each layer of `READ_AFTER`, and tells outlines."""

    def __init__(self) -> None:
        super().__init__()
        answers = sum(len(kind) for kind in QUESTIONS_OF_A_THING)
        self.heads = nn.ModuleList(nn.Linear(DIM, answers) for _ in READ_AFTER)
        self.outlines = nn.ModuleList(nn.Linear(DIM, CELLS * CELLS) for _ in READ_AFTER)
        self.positions = nn.ModuleList(nn.Linear(DIM, 2 * WAVES) for _ in PLACED_AFTER)

    def forward(self, shown: Sequence[Tensor], inside: Tensor) -> Tensor:
        """Logits of all questions together `[layers, things' patches, answers]`.

        Args:
            shown: image tokens after each layer `[n, patches, DIM]`.
            inside: bool `[n, patches]`, the patches to read.
        """
        tokens = [nn.functional.rms_norm(shown[layer][inside].float(), (DIM,)) for layer in READ_AFTER]
        return torch.stack([head(read) for head, read in zip(self.heads, tokens, strict=True)])

    def coverage(self, shown: Sequence[Tensor]) -> Tensor:
        """Logits of how far each cell of each patch is covered by things, `[layers, n, patches, CELLS * CELLS]`."""
        tokens = [nn.functional.rms_norm(shown[layer].float(), (DIM,)) for layer in READ_AFTER]
        return torch.stack([outline(read) for outline, read in zip(self.outlines, tokens, strict=True)])

    def placed(self, shown: Sequence[Tensor]) -> Tensor:
        """Where each patch is, as `waves` tells it: `[layers, n, patches, 2 * WAVES]`."""
        tokens = [nn.functional.rms_norm(shown[layer].float(), (DIM,)) for layer in PLACED_AFTER]
        return torch.stack([position(read) for position, read in zip(self.positions, tokens, strict=True)])


def things_loss(reader: ThingReader, shown: Sequence[Tensor], examples: Sequence[Example], latents: Tensor) -> Tensor:
    """Mean cross entropy of what the image tokens `[n, patches, DIM]` of each layer tell of the thing they belong to.

    `latents` are the pictures' own, `[n, 16, height, width]`.
    """
    inside, right = answers_of_patches(examples, latents.cpu())
    logits = reader(shown, inside.to(latents.device))
    kinds = [len(kind) for kind in QUESTIONS_OF_A_THING]
    read = logits.flatten(0, 1).split(kinds, dim=-1)
    return facts_loss(read, right.repeat(len(logits), 1).to(latents.device))


def outlines_loss(
    reader: ThingReader, shown: Sequence[Tensor], examples: Sequence[Example], size: tuple[int, int]
) -> Tensor:
    """Mean cross entropy of the things' outlines, of the examples whose text tells them; `size` is width and height."""
    kept = [index for index, example in enumerate(examples) if _tells_outlines(example)]
    if not kept:
        return torch.zeros((), device=shown[0].device)
    covered = torch.stack([coverage(examples[index].scene, size) for index in kept]).to(shown[0].device)
    logits = reader.coverage([tokens[kept] for tokens in shown])
    return nn.functional.binary_cross_entropy_with_logits(logits, covered.expand_as(logits))


def waves(size: tuple[int, int]) -> Tensor:
    """Where patches are, 0 to 1 along each axis, as cosines `[patches, 2 * WAVES]`: first of the rows, then columns."""
    columns, rows = size[0] // PATCH_PX, size[1] // PATCH_PX
    places = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    turns = math.pi * torch.arange(1, WAVES + 1)
    return torch.cat([torch.cos(place.flatten()[:, None] * turns) for place in places], -1)


def coverage(scene: Scene, size: tuple[int, int]) -> Tensor:
    """How far the things of a scene cover each cell of each patch, 0 to 1: `[patches, CELLS * CELLS]`."""
    return torch.stack([_covered(thing.shape, thing.size, thing.place, size) for thing in scene.things]).amax(0)


@lru_cache(maxsize=2048)
def _covered(shape: Shape, thing_size: Size, place: Place, size: tuple[int, int]) -> Tensor:
    thing = Thing(shape=shape, colour=Colour.WHITE, size=thing_size, place=place)
    drawn = render(Scene(background=Colour.BLACK, things=(thing,)), width=size[0], height=size[1]).convert("L")
    levels = torch.from_numpy(np.asarray(drawn.reduce(PATCH_PX // CELLS), dtype=np.float32))
    darkest, lightest = RGB[Colour.BLACK][0], RGB[Colour.WHITE][0]
    cells = ((levels - darkest) / (lightest - darkest)).clamp(0, 1)
    rows, columns = size[1] // PATCH_PX, size[0] // PATCH_PX
    return cells.view(rows, CELLS, columns, CELLS).transpose(1, 2).reshape(rows * columns, CELLS * CELLS)


def _tells_outlines(example: Example) -> bool:
    """Whether the text names all that an outline depends on."""
    said = example.said
    return example.kind in ("said", "long") and said.shape and (said.place or len(example.scene.things) == 1)


def answers_of_patches(examples: Sequence[Example], latents: Tensor) -> tuple[Tensor, Tensor]:
    """Which patches show a thing, bool `[n, patches]`, and what each of them is part of, int64 `[things' patches, 5]`.

    A patch belongs to the nearer of two things.
    """
    inside = nn.functional.max_pool2d(belongs_to_things(latents).float(), PATCH).bool().flatten(1)
    rows, columns = latents.shape[2] // PATCH, latents.shape[3] // PATCH
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    patches = torch.stack([y, x], -1).flatten(0, 1)
    nearest = torch.stack([_distances(patches, example).argmin(1) for example in examples])
    # all answers but the background's, [n, things, questions]
    right = told(examples)[:, 1:].view(len(examples), -1, len(QUESTIONS_OF_A_THING))
    return inside, right.gather(1, nearest[..., None].expand(-1, -1, right.shape[2]))[inside]


def _distances(patches: Tensor, example: Example) -> Tensor:
    """Of patches `[patches, 2]` from the middle of each thing's place `[patches, things]`; heights and widths are 1."""
    centers = [((thing.place.row + 0.5) / 3, (thing.place.column + 0.5) / 3) for thing in example.scene.things]
    return torch.cdist(patches, torch.tensor(centers))


def train_drawing(
    learnt: Learnt, dit: ZImageTransformer2DModel, batches: TextBatches, folder: Path, device: torch.device
) -> None:
    """Trains the DiT further in place; the language model and the VAE stay as they are."""
    torch.manual_seed(6)
    learnt.text.requires_grad_(requires_grad=False)
    use_real_rotation(dit)
    pools = Pools(learnt.vae, folder / "latents")
    reader = ThingReader().to(device)
    quick = _compiled()

    def losses(step: int) -> Losses:
        rng = random.Random(8_000_000 + step)
        size = _random_size(rng)
        blended = size == SIZES[0] and rng.random() < BLENDED
        count = IMAGES.get(size, IMAGES_OTHERS)
        rows, examples, latents = _batch(pools, batches, rng, size, count, blended=blended)
        latents = latents.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                states, said = _read(learnt, batches, rows, examples, device)
            sigma = _sigmas(rng, count).to(device)
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step)).to(device)
            spread = sigma[:, None, None, None]
            forward = quick if size in IMAGES and states.shape[1] <= 2 * MULTIPLE else predict_and_show
            output, shown = forward(dit, (1 - spread) * latents + spread * noise, 1 - sigma, states, said)
        things = THINGS_WEIGHT * things_loss(reader, shown, examples, latents)
        outlines = OUTLINES_WEIGHT * outlines_loss(reader, shown, examples, size)
        placed = reader.placed(shown)
        positions = POSITIONS_WEIGHT * nn.functional.mse_loss(placed, waves(size).to(device).expand_as(placed))
        flow = flow_loss(output.float(), latents, noise)
        return {"flow": flow, "things": things, "outlines": outlines, "positions": positions}

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
    learnt: Learnt, batches: TextBatches, rows: list[list[int]], examples: Sequence[Example], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Hidden states of the prompts `[n, tokens, width]` and which of them are said."""
    references, tokens, said = token_rows(batches, rows, examples)
    # hidden state -2 without the head, which would be most of the work
    model: Any = learnt.text.model
    states = model(tokens.to(device), use_cache=False, output_hidden_states=True).hidden_states[HIDDEN_LAYER]
    return blended_states(states, rows, references, examples), said[: len(rows)].to(device)


def _sigmas(rng: random.Random, count: int) -> Tensor:
    values = []
    for _ in range(count):
        base = torch.sigmoid(torch.tensor(rng.gauss(SIGMA_CENTER, SIGMA_SPREAD))).item()
        values.append(1.0 if rng.random() < PURE_NOISE else SHIFT * base / (1 + (SHIFT - 1) * base))
    return torch.tensor(values)
