"""What the image tokens of the DiT are to know while it learns, read by linear layers that are thrown away afterwards.

An outline is a small part of the flow's error, and in other colours each time: by that error alone the DiT had not
begun to take shapes from the text after 6,000 steps. So its tokens learn which thing a patch belongs to, the outlines
that the text asks for, and where in the picture a patch is. They know that only by their rotary position embedding,
and an outline can be no sharper than what they know of it.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from demo_model.render import render
from demo_model.training.dit import DIM, PATCH
from demo_model.training.facts import QUESTIONS_OF_A_THING, facts_loss
from demo_model.training.joint import balance, belongs_to_things, told
from demo_model.training.latents import Example
from demo_model.training.loop import Losses
from demo_model.world import RGB, Colour, Place, Scene, Shape, Size, Thing

READ_AFTER = (1, 2, 3)  # layers, from 0, whose image tokens are read; those after them draw what is known
PLACED_AFTER = (0, 1, 2)  # layers whose image tokens are to know where they are
THINGS_WEIGHT, OUTLINES_WEIGHT, POSITIONS_WEIGHT = 0.3, 0.6, 0.3
WAVES = 6  # of growing frequency along each axis: what positions are told by
CELLS = 4  # a patch's outline is told in so many rows and columns
PATCH_PX = 8 * PATCH


class PatchReader(nn.Module):
    """Reads `shown`, the image tokens after each layer `[n, patches, DIM]`."""

    def __init__(self) -> None:
        super().__init__()
        answers = sum(len(kind) for kind in QUESTIONS_OF_A_THING)
        self._things = nn.ModuleList(nn.Linear(DIM, answers) for _ in READ_AFTER)
        self._outlines = nn.ModuleList(nn.Linear(DIM, CELLS * CELLS) for _ in READ_AFTER)
        self._positions = nn.ModuleList(nn.Linear(DIM, 2 * WAVES) for _ in PLACED_AFTER)

    def things(self, shown: Sequence[Tensor], inside: Tensor) -> Tensor:
        """Logits of `QUESTIONS_OF_A_THING` together, for the patches `inside`, bool `[n, patches]`:
        `[layers, patches of things, answers]`."""
        return self._read(self._things, [shown[layer][inside] for layer in READ_AFTER])

    def outlines(self, shown: Sequence[Tensor]) -> Tensor:
        """Logits of `coverage`, `[layers, n, patches, CELLS * CELLS]`."""
        return self._read(self._outlines, [shown[layer] for layer in READ_AFTER])

    def positions(self, shown: Sequence[Tensor]) -> Tensor:
        """`waves` as it is read, `[layers, n, patches, 2 * WAVES]`."""
        return self._read(self._positions, [shown[layer] for layer in PLACED_AFTER])

    @staticmethod
    def _read(heads: nn.ModuleList, tokens: Sequence[Tensor]) -> Tensor:
        normed = [nn.functional.rms_norm(layer.float(), (DIM,)) for layer in tokens]
        return torch.stack([head(layer) for head, layer in zip(heads, normed, strict=True)])


def reading_losses(
    reader: PatchReader, shown: Sequence[Tensor], examples: Sequence[Example], latents: Tensor
) -> Losses:
    """What the image tokens after each layer `[n, patches, DIM]` do not know, weighted.

    `latents` are the pictures' own, `[n, 16, height, width]`.
    """
    things = things_loss(reader, shown, examples, latents)
    outlines = outlines_loss(reader, shown, examples, latents)
    read = reader.positions(shown)
    places = waves(_size_of(latents)).to(read).expand_as(read)
    return {
        "things": THINGS_WEIGHT * things,
        "outlines": OUTLINES_WEIGHT * outlines,
        "positions": POSITIONS_WEIGHT * nn.functional.mse_loss(read, places),
    }


def things_loss(reader: PatchReader, shown: Sequence[Tensor], examples: Sequence[Example], latents: Tensor) -> Tensor:
    """Mean cross entropy of what the patches of things tell of the thing that each belongs to."""
    inside, right = answers_of_patches(examples, latents.cpu())
    logits = reader.things(shown, inside.to(latents.device))
    kinds = [len(kind) for kind in QUESTIONS_OF_A_THING]
    read = torch.split(logits.flatten(0, 1), kinds, dim=-1)
    return facts_loss(read, right.repeat(len(logits), 1).to(latents.device))


def outlines_loss(reader: PatchReader, shown: Sequence[Tensor], examples: Sequence[Example], latents: Tensor) -> Tensor:
    """Mean cross entropy of the things' outlines, half of it near them, of the examples whose text tells them."""
    kept = [index for index, example in enumerate(examples) if _tells_outlines(example)]
    if not kept:
        return torch.zeros((), device=shown[0].device)
    size = _size_of(latents)
    covered = torch.stack([coverage(examples[index].scene, size) for index in kept])
    logits = reader.outlines([tokens[kept] for tokens in shown])
    weights = balance(_near(covered, size)).to(logits)[..., None].expand_as(logits)
    return nn.functional.binary_cross_entropy_with_logits(logits, covered.to(logits).expand_as(logits), weights)


def waves(size: tuple[int, int]) -> Tensor:
    """Where patches are, 0 to 1 along each axis, as cosines `[patches, 2 * WAVES]`: first of the rows, then columns."""
    columns, rows = size[0] // PATCH_PX, size[1] // PATCH_PX
    places = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    turns = math.pi * torch.arange(1, WAVES + 1)
    return torch.cat([torch.cos(place.flatten()[:, None] * turns) for place in places], -1)


def coverage(scene: Scene, size: tuple[int, int]) -> Tensor:
    """How far the things of a scene cover each cell of each patch, 0 to 1: `[patches, CELLS * CELLS]`."""
    return torch.stack([_covered(thing.shape, thing.size, thing.place, size) for thing in scene.things]).amax(0)


def _near(covered: Tensor, size: tuple[int, int]) -> Tensor:
    """The patches that things cover a part of, and those beside them: bool `[n, patches]`."""
    touched = (covered.amax(-1) > 0).float().view(len(covered), 1, size[1] // PATCH_PX, size[0] // PATCH_PX)
    return nn.functional.max_pool2d(touched, 3, stride=1, padding=1).bool().flatten(1)


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
    scenes = [example.scene for example in examples]
    nearest = nearest_things(scenes, latents.shape[2] // PATCH, latents.shape[3] // PATCH)
    # all answers but the background's, [n, things, questions]
    right = told(examples)[:, 1:].view(len(examples), -1, len(QUESTIONS_OF_A_THING))
    return inside, right.gather(1, nearest[..., None].expand(-1, -1, right.shape[2]))[inside]


def shown_things(scenes: Sequence[Scene], latents: Tensor) -> Tensor:
    """Which latents of `[n, 16, height, width]` show each thing of their scenes: bool `[n, things, height, width]`."""
    rows, columns = latents.shape[2:]
    nearest = nearest_things(scenes, rows, columns).view(-1, 1, rows, columns)
    count = max(len(scene.things) for scene in scenes)
    return belongs_to_things(latents) & (nearest == torch.arange(count)[:, None, None]).to(latents.device)


def nearest_things(scenes: Sequence[Scene], rows: int, columns: int) -> Tensor:
    """For each cell of a grid over the pictures the thing whose place is nearest to it: int64 `[n, rows * columns]`."""
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    cells = torch.stack([y, x], -1).flatten(0, 1)
    return torch.stack([_distances(cells, scene).argmin(1) for scene in scenes])


def _distances(cells: Tensor, scene: Scene) -> Tensor:
    """Of cells `[cells, 2]` from the middle of each thing's place `[cells, things]`; heights and widths are 1."""
    centers = [((thing.place.row + 0.5) / 3, (thing.place.column + 0.5) / 3) for thing in scene.things]
    return torch.cdist(cells, torch.tensor(centers))


def _size_of(latents: Tensor) -> tuple[int, int]:
    """Width and height of the pictures in pixels."""
    return 8 * latents.shape[3], 8 * latents.shape[2]
