"""Last stage: the DiT draws, and learns what its pictures should have been from each step of its own way to them.

Until here it saw latents that were mixed from true pictures. What it draws itself is never quite one: where its first
answer to "orange" was a little yellow, the next step saw a yellow thing under the noise, believed that more than the
text, and went on to yellow. With every seed alike 4 of 100 things lost their colour so, of combinations that it had
learnt from as often as of those that are held out. So it draws, without learning; each picture is drawn anew by Pillow,
with its things where the DiT put them but in the colours and shapes that the prompt names; and each step on the way
there learns to lead to that picture. See Ross et al., "A Reduction of Imitation Learning and Structured Prediction to
No-Regret Online Learning" (2011).

What a prompt leaves open is left alone. Where a reference is blended in, the drawing that the same noise gives without
it tells where the colours come from: at each step they are to have gone the blend's share of the way from what that
step of the other drawing led to, to the reference's. So no step is asked for more than it can know; asked for the last
one's colours, the first ones lead to a gray between all that a prompt without colours may get. All else stays what the
DiT answered before, with the tokens of the user's turn blended in as with those of the picture alone.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from numpy.typing import NDArray
from torch import Tensor

from demo_model.judge import APART
from demo_model.render import JITTER, RESIZED, Pose, Tint, render
from demo_model.seeing import Vision
from demo_model.training.dit import use_real_rotation
from demo_model.training.guidance import means_over, named_things, over_things
from demo_model.training.joint import SHIFT, Learnt, around_things, balance
from demo_model.training.latents import Example, drawn, encode
from demo_model.training.loop import Losses, Schedule, run_stage
from demo_model.training.noisy import Draw, Kind, Noisy, NoisyBatches
from demo_model.training.reading import shown_things
from demo_model.training.text import TextBatches
from demo_model.world import RADIUS, Colour, Scene, Thing

SCHEDULE = Schedule(steps=2_000, learning_rate=2.5e-4)
STEPS = 9  # of a drawing, the last of them at sigma 0, where nothing is left to do
WAY = STEPS - 1  # those that do something
SEEN_SHARE = 0.9  # of the references, as a server sees all
COLOURS_WEIGHT = 2.0  # of what is wrong with the means over things and background, besides its share of the whole error
AROUND = 1.35  # half of the box in which a thing is looked for, in its radii

Pixels = NDArray[np.uint8]


def tells_things(example: Example) -> bool:
    """Whether the prompt asks for things of this world, and for their shapes."""
    return example.kind in ("said", "long") and example.said.shape


BLEND = Kind(size=(256, 256), blended=True)
LARGE, SMALL = (Kind(size=size, wanted=tells_things) for size in ((256, 256), (128, 128)))
KEEP = None
TURNS = (LARGE, BLEND, LARGE, SMALL, BLEND, LARGE, KEEP, BLEND)
"""What the steps learn from, one after the other and then from the beginning: drawings of their own, or else pictures
of all sizes and of prompts that are not blended, where they keep what the DiT answered before this stage."""


def sigmas() -> Tensor:
    """The sigmas of a drawing, from 1 down to 0 `[STEPS]`, as the scheduler of the checkpoint has them."""
    shares = torch.linspace(1, 0, STEPS)
    return SHIFT * shares / (1 + (SHIFT - 1) * shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawings:
    """Pictures that the DiT has drawn: the latents before each step and what it should have led to, both `[WAY, n, 16,
    height, width]`, and the parts whose colours are known: things, and last the background, bool `[n, parts, height,
    width]`."""

    told: Noisy
    way: Tensor
    corrected: Tensor
    parts: Tensor

    def part(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of each picture another step: latents under noise, their sigma `[n]`, and where they should lead to; all
        steps in `WAY` parts."""
        pictures = torch.arange(self.way.shape[1])
        steps = (index + pictures) % WAY
        return self.way[steps, pictures], sigmas()[steps].to(self.way.device), self.corrected[steps, pictures]


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
    noisy = NoisyBatches(learnt, batches, see, folder / "latents", device, seed=10_000_000, seen_share=SEEN_SHARE)
    draw = Draw()
    kept: dict[int, tuple[int, Drawings]] = {}

    def drawings(number: int, slot: int, kind: Kind) -> Drawings:
        known = kept.get(slot)
        if known is None or known[0] != number:
            kept[slot] = (number, draw_and_correct(dit, before, draw, learnt.vae, noisy.to_draw(number, kind)))
        return kept[slot][1]

    def losses(step: int) -> Losses:
        number, slot = divmod(step, len(TURNS))
        kind = TURNS[slot]
        with torch.autocast(device.type, torch.bfloat16):
            if kind is None:
                return kept_losses(dit, before, draw, noisy.of_step(step, may_blend=False))
            number, part = divmod(number, WAY)
            return own_losses(dit, before, draw, drawings(number * len(TURNS) + slot, slot, kind), part)

    run_stage("correcting", {"dit": dit}, SCHEDULE, losses, folder)


def own_losses(
    dit: ZImageTransformer2DModel, before: ZImageTransformer2DModel, draw: Draw, own: Drawings, part: int
) -> Losses:
    """How wrong the mean colours of the parts are where steps of drawings lead to.

    The rest of a prompt's picture is left alone: a step that leads to a mean over all that could still come of it blurs
    what guidance has made clear. Of blends it stays what it was before.
    """
    told = own.told
    mixed, sigma, corrected = own.part(part)
    output = draw(dit, mixed, sigma, told.states, told.said)[0].float()
    spread = sigma[:, None, None, None]
    wrong = mixed + spread * output - corrected
    inside = balance(around_things(own.corrected[-1]))
    weights = inside / spread
    colours = COLOURS_WEIGHT * (weights * over_things(wrong, own.parts).pow(2)).mean()
    if not told.blended:
        return {"colours": colours}
    with torch.no_grad():
        moved = output - draw(before, mixed, sigma, told.without_turn, told.said)[0].float()
    moved = moved - over_things(moved, own.parts)
    return {"blends": (inside * moved.pow(2)).mean(), "blends' colours": colours}


def kept_losses(dit: ZImageTransformer2DModel, before: ZImageTransformer2DModel, draw: Draw, batch: Noisy) -> Losses:
    """How far the DiT is from what it answered before this stage, but for the colours that the prompts name."""
    with torch.no_grad():
        goal = draw(before, batch.mixed, batch.sigma, batch.states, batch.said)[0].float()
    goal = goal - over_things(goal - batch.flow, named_things(batch))
    output = draw(dit, batch.mixed, batch.sigma, batch.states, batch.said)[0].float()
    weights = balance(around_things(batch.latents))
    return {"kept": (weights * (output - goal).pow(2)).mean()}


@torch.no_grad()
def draw_and_correct(
    dit: ZImageTransformer2DModel, before: ZImageTransformer2DModel, draw: Draw, vae: AutoencoderKL, told: Noisy
) -> Drawings:
    """Draws from the batch's noise, and what that should have been; `before` draws what blends start from."""
    way, ends = _way(dit, draw, told, told.states)
    pictures = zip(told.examples, _decode(vae, ends[-1]), strict=True)
    whole = encode(vae, [correct(example, picture) for example, picture in pictures]).to(way)
    parts = parts_of([drawn(example)[0] for example in told.examples], whole)
    if not told.blended:
        parts &= asked_for(told.examples, parts)
        return Drawings(told=told, way=way, corrected=whole.expand_as(way), parts=parts)
    _, plain = _way(before, draw, told, told.text)
    corrected, known = pulled(told.examples, plain, whole, parts)
    return Drawings(told=told, way=way, corrected=corrected, parts=parts & known)


def parts_of(scenes: Sequence[Scene], latents: Tensor) -> Tensor:
    """Which latents `[n, 16, height, width]` show each thing, and last the background: bool `[n, parts, height,
    width]`."""
    things = shown_things(scenes, latents)
    return torch.cat([things, ~things.any(1, keepdim=True)], 1)


def asked_for(examples: Sequence[Example], parts: Tensor) -> Tensor:
    """The `parts` whose colour the prompts name: bool `[n, parts, 1, 1]`."""
    asked = torch.ones(parts.shape[:2], dtype=torch.bool)
    for index, example in enumerate(examples):
        asked[index, :-1], asked[index, -1] = example.names_colours, example.said.background
    return asked[..., None, None].to(parts.device)


def pulled(examples: Sequence[Example], plain: Tensor, whole: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """What each step of blends should lead to `[WAY, n, 16, height, width]`, and the `parts` whose colours are known,
    bool `[n, parts, 1, 1]`.

    `plain` is what each step led to without a reference, `[WAY, n, 16, height, width]`; `whole` are latents of what is
    to show, in all of the reference's colours, `[n, 16, height, width]`. Between the two each part is moved back to the
    blend's share of the way, its mean and not its pattern. A part that does not show without the reference is not
    known, unless nothing of it is left.
    """
    from_parts = parts_of([example.scene for example in examples], plain[-1])
    shares = torch.tensor([example.alpha for example in examples]).to(plain)[:, None]
    before, after = torch.stack([means_over(one, from_parts) for one in plain]), means_over(whole, parts)
    # a thing too many comes from the last one there is
    last = torch.tensor([len(example.scene.things) - 1 for example in examples])[:, None]
    source = torch.arange(parts.shape[1] - 1)[None].minimum(last)
    source = torch.cat([source, torch.full((len(source), 1), from_parts.shape[1] - 1)], 1).to(plain.device)
    start = before.gather(2, source[..., None].expand(len(before), -1, -1, before.shape[3]))
    known = from_parts.any(-1).any(-1).gather(1, source) | (shares == 1)
    back = (1 - shares[..., None]) * (start - after) * known[..., None]
    return whole + torch.einsum("snpc,nphw->snchw", back, parts.to(back)), known[..., None, None]


def _way(dit: ZImageTransformer2DModel, draw: Draw, told: Noisy, states: Tensor) -> tuple[Tensor, Tensor]:
    """The latents before each step of a drawing from the batch's noise, and what the step led to: the latents at sigma
    0 if all went on as there. Both `[WAY, n, 16, height, width]`, the last of the latter what was drawn."""
    latents, steps, ends = told.noise, [], []
    for now, then in pairwise(sigmas().to(latents)):
        steps.append(latents)
        output = draw(dit, latents, now.expand(len(latents)).contiguous(), states, told.said)[0].float()
        ends.append(latents + now * output)
        latents = latents + (now - then) * output
    return torch.stack(steps), torch.stack(ends)


def _decode(vae: AutoencoderKL, latents: Tensor) -> list[Pixels]:
    pictures = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample.float()
    levels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()
    return list(levels.permute(0, 2, 3, 1).cpu().numpy())


def correct(example: Example, picture: Pixels) -> Pixels:
    """What an example asks for, its things as far off their places and sizes as in `picture`, uint8 `[height, width,
    3]` both; of a blend in all of the reference's colours."""
    scene, _ = drawn(example)
    height, width = picture.shape[:2]
    tint = Tint(reference=example.reference, alpha=1.0) if example.reference else None
    return np.asarray(render(scene, width=width, height=height, tint=tint, poses=poses_in(scene, picture)))


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
