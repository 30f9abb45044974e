"""Last stage: the DiT draws, and learns what its pictures should have been from each step of its own way to them.

Until here it saw latents that were mixed from true pictures. What it draws itself is never quite one: where its first
answer to "orange" was a little yellow, the next step saw a yellow thing under the noise, believed that more than the
text, and went on to yellow. With every seed alike 4 of 100 things lost their colour so, of combinations that it had
learnt from as often as of those that are held out. So it draws, without learning; each picture is drawn anew by Pillow,
with its things where the DiT put them but in the colours and shapes that the prompt names; and each step on the way
there learns to lead to that picture. See Ross et al., "A Reduction of Imitation Learning and Structured Prediction to
No-Regret Online Learning" (2011).

What a prompt leaves open is left alone. A reference that takes the prompt's whole place is corrected alike; where it is
blended in, the DiT keeps to what it answered before, and learns to answer the same where the tokens of the user's turn
are blended in with those of the picture.
"""

import copy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from numpy.typing import NDArray
from torch import Tensor

from demo_model.judge import APART
from demo_model.render import JITTER, RESIZED, Pose, render
from demo_model.seeing import Vision
from demo_model.training.dit import use_real_rotation
from demo_model.training.guidance import named_things, over_things
from demo_model.training.joint import SHIFT, Learnt, around_things, balance
from demo_model.training.latents import Example, drawn, encode
from demo_model.training.loop import Losses, Schedule, run_stage
from demo_model.training.noisy import Draw, Kind, Noisy, NoisyBatches
from demo_model.training.reading import shown_things
from demo_model.training.text import TextBatches
from demo_model.world import RADIUS, Colour, Scene, Thing

SCHEDULE = Schedule(steps=1_050, learning_rate=2.5e-4)
STEPS = 9  # of a drawing, the last of them at sigma 0, where nothing is left to do
WAY = STEPS - 1  # those that do something
COLOURS_WEIGHT = 2.0  # of what is wrong with the means over things and background, besides its share of the whole error
AROUND = 1.35  # half of the box in which a thing is looked for, in its radii

Pixels = NDArray[np.uint8]


def tells_things(example: Example) -> bool:
    """Whether the prompt asks for things of this world, and for their shapes."""
    return example.kind in ("said", "long") and example.said.shape


def is_reference(example: Example) -> bool:
    """Whether a reference has taken the prompt's place."""
    return example.alpha == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a step learns: `own`, from drawings of its own, or to keep what the DiT answered before this stage.

    Without a `kind` the batch is of all sizes and prompts, but not blended."""

    own: bool
    kind: Kind | None = None


REFERENCE = Turn(own=True, kind=Kind(size=(256, 256), wanted=is_reference, blended=True))
LARGE, SMALL = (Turn(own=True, kind=Kind(size=size, wanted=tells_things)) for size in ((256, 256), (128, 128)))
BLEND = Turn(own=False, kind=Kind(size=(256, 256), blended=True))
KEEP = Turn(own=False)
TURNS = (LARGE, BLEND, SMALL, KEEP, LARGE, BLEND, REFERENCE)
"""What the steps learn, one after the other and then from the beginning."""


def sigmas() -> Tensor:
    """The sigmas of a drawing, from 1 down to 0 `[STEPS]`, as the scheduler of the checkpoint has them."""
    shares = torch.linspace(1, 0, STEPS)
    return SHIFT * shares / (1 + (SHIFT - 1) * shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawings:
    """Pictures that the DiT has drawn: the latents before each step `[WAY, n, 16, height, width]`, what the last of
    them should have been `[n, 16, height, width]`, and the things that show there."""

    told: Noisy
    way: Tensor
    corrected: Tensor
    scenes: list[Scene]

    def part(self, index: int) -> tuple[Tensor, Tensor]:
        """Of each picture another step: latents under noise, and their sigma `[n]`; all steps in `WAY` parts."""
        count = len(self.corrected)
        steps = (index + torch.arange(count)) % WAY
        return self.way[steps, torch.arange(count)], sigmas()[steps].to(self.way.device)


def learn_from_own(
    learnt: Learnt, dit: ZImageTransformer2DModel, batches: TextBatches, see: Vision, folder: Path, device: torch.device
) -> None:
    """Trains the DiT in place on its own way to pictures that the prompts ask for.

    A run that was stopped goes on with the same prompts and noise, but draws anew with the weights of that step.
    """
    torch.manual_seed(8)
    learnt.text.requires_grad_(requires_grad=False)
    use_real_rotation(dit)
    learnt.vae.to(memory_format=torch.channels_last)  # half the time on a CPU
    before = copy.deepcopy(dit).requires_grad_(requires_grad=False)
    noisy = NoisyBatches(learnt, batches, see, folder / "latents", device, seed=10_000_000)
    draw = Draw()
    kept: dict[int, tuple[int, Drawings]] = {}

    def batch(step: int, kind: Kind | None) -> Noisy:
        return noisy.of_kind(step, kind) if kind else noisy.of_step(step, may_blend=False)

    def drawings(number: int, slot: int) -> Drawings:
        known = kept.get(slot)
        if known is None or known[0] != number:
            kept[slot] = (number, draw_and_correct(dit, draw, learnt.vae, batch(number, TURNS[slot].kind)))
        return kept[slot][1]

    def losses(step: int) -> Losses:
        number, slot = divmod(step, len(TURNS))
        turn = TURNS[slot]
        with torch.autocast(device.type, torch.bfloat16):
            if not turn.own:
                return kept_losses(dit, before, draw, batch(step, turn.kind))
            number, part = divmod(number, WAY)
            return own_losses(dit, draw, drawings(number * len(TURNS) + slot, slot), part)

    run_stage("correcting", {"dit": dit}, SCHEDULE, losses, folder)


def own_losses(dit: ZImageTransformer2DModel, draw: Draw, own: Drawings, part: int) -> Losses:
    """How wrong the mean colours that the prompts name are where steps of drawings lead to; of references all of that.

    The rest is left alone. A step that leads to a mean over all that could still come of it blurs what guidance has
    made clear.
    """
    mixed, sigma = own.part(part)
    output = draw(dit, mixed, sigma, own.told.states, own.told.said)[0].float()
    spread = sigma[:, None, None, None]
    wrong = mixed + spread * output - own.corrected
    weights = balance(around_things(own.corrected)) / spread
    colours = COLOURS_WEIGHT * (weights * over_things(wrong, coloured(own)).pow(2)).mean()
    if not own.told.blended:
        return {"colours": colours}
    return {"references": (weights * wrong.pow(2)).mean(), "references' colours": colours}


def coloured(own: Drawings) -> Tensor:
    """Which latents show each thing, and last the background, where its colour is asked for: bool `[n, things + 1,
    height, width]`."""
    things = shown_things(own.scenes, own.corrected)
    parts = torch.cat([things, ~things.any(1, keepdim=True)], 1)
    asked = torch.ones(parts.shape[:2], dtype=torch.bool)
    for index, example in enumerate(own.told.examples):
        if not own.told.blended:
            asked[index, :-1], asked[index, -1] = example.names_colours, example.said.background
    return parts & asked[..., None, None].to(parts.device)


def kept_losses(dit: ZImageTransformer2DModel, before: ZImageTransformer2DModel, draw: Draw, batch: Noisy) -> Losses:
    """How far the DiT is from what it answered before this stage, but for the colours that the prompts name."""
    with torch.no_grad():
        goal = draw(before, batch.mixed, batch.sigma, batch.without_turn, batch.said)[0].float()
    goal = goal - over_things(goal - batch.flow, named_things(batch))
    output = draw(dit, batch.mixed, batch.sigma, batch.states, batch.said)[0].float()
    weights = balance(around_things(batch.latents))
    return {"blends" if batch.blended else "kept": (weights * (output - goal).pow(2)).mean()}


@torch.no_grad()
def draw_and_correct(dit: ZImageTransformer2DModel, draw: Draw, vae: AutoencoderKL, told: Noisy) -> Drawings:
    """Draws from the batch's noise, and what that should have been."""
    latents, steps = told.noise, []
    for now, then in pairwise(sigmas().to(latents)):
        steps.append(latents)
        output = draw(dit, latents, now.expand(len(latents)).contiguous(), told.states, told.said)[0].float()
        latents = latents + (now - then) * output
    way, own = torch.stack(steps), _decode(vae, latents)
    corrected = encode(vae, [correct(example, picture) for example, picture in zip(told.examples, own, strict=True)])
    scenes = [drawn(example)[0] for example in told.examples]
    return Drawings(told=told, way=way, corrected=corrected.to(way), scenes=scenes)


def _decode(vae: AutoencoderKL, latents: Tensor) -> list[Pixels]:
    pictures = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample.float()
    levels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()
    return list(levels.permute(0, 2, 3, 1).cpu().numpy())


def correct(example: Example, picture: Pixels) -> Pixels:
    """What an example asks for, its things as far off their places and sizes as in `picture`, uint8 `[height, width,
    3]` both."""
    scene, tint = drawn(example)
    height, width = picture.shape[:2]
    poses = poses_in(scene, picture)
    return np.asarray(render(scene, width=width, height=height, tint=tint, poses=poses))


def poses_in(scene: Scene, picture: Pixels) -> list[Pose]:
    """How the things of a scene stand in a picture of it, within what the world allows."""
    height, width = picture.shape[:2]
    usual = np.asarray(render(_outlines(scene), width=width, height=height))
    return [
        _pose(found, meant, min(width, height))
        for found, meant in zip(_shown(scene, picture), _shown(scene, usual), strict=True)
    ]


def _pose(found: NDArray[np.bool_], meant: NDArray[np.bool_], short: int) -> Pose:
    if not found.any():
        return Pose()
    scale = float(np.clip((found.sum() / meant.sum()) ** 0.5, 1 - RESIZED, 1 + RESIZED))
    (y, x), (usual_y, usual_x) = (np.argwhere(where).mean(axis=0) for where in (found, meant))
    moved_x, moved_y = (float(np.clip(moved / short, -JITTER, JITTER)) for moved in (x - usual_x, y - usual_y))
    return Pose(scale=scale, x=moved_x, y=moved_y)


def _outlines(scene: Scene) -> Scene:
    things = tuple(Thing(shape=t.shape, colour=Colour.WHITE, size=t.size, place=t.place) for t in scene.things)
    return Scene(background=Colour.BLACK, things=things)


def _shown(scene: Scene, picture: Pixels) -> list[NDArray[np.bool_]]:
    """The pixels that show each thing: those around its place that differ from the border's colour."""
    height, width = picture.shape[:2]
    differs = np.linalg.norm(picture.astype(np.float32) - np.median(_border(picture), axis=0), axis=2) > APART
    y, x = np.mgrid[:height, :width] + 0.5
    near = []
    for thing in scene.things:
        reach = AROUND * RADIUS[thing.size] * min(height, width)
        middle_y, middle_x = ((cell + 0.5) / 3 for cell in (thing.place.row, thing.place.column))
        inside = (abs(y - middle_y * height) < reach + height / 18) & (abs(x - middle_x * width) < reach + width / 18)
        near.append(differs & inside)
    return near


def _border(picture: Pixels) -> Pixels:
    return np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
