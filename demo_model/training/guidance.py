"""Last stage but one: the DiT learns to draw at once what it draws with guidance, which costs two forwards a step.

Guidance goes on from what the empty prompt gives to what the prompt gives, and as far again. What a small DiT has
learnt only in part (two tones of a pattern that run into each other, the outline of a small thing) stands out by that.
The published model is distilled in the same way and is run without guidance too; see Meng et al., "On Distillation of
Guided Diffusion Models" (2023).

Guidance also goes beyond the colour that is asked for: orange becomes yellow, brown black. So the mean over each thing
whose colour is named comes from the picture, and so does all of a prompt that is blended with a reference, whose pull
guidance would exaggerate.
"""

import copy
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from demo_model.seeing import Vision
from demo_model.training.dit import use_real_rotation
from demo_model.training.joint import Learnt, around_things, balance
from demo_model.training.loop import Losses, Schedule, run_stage
from demo_model.training.noisy import Draw, Noisy, NoisyBatches
from demo_model.training.reading import shown_things
from demo_model.training.text import TextBatches

SCHEDULE = Schedule(steps=12_000, learning_rate=8e-4)
GUIDANCE = 1.0  # how far beyond the prompt's output, as a share of its way from the empty prompt's
COLOURS_WEIGHT = 2.0  # of what is wrong with the mean over a thing, besides its share of the whole error


class Guided:
    """What a DiT answers with guidance; `nothing` are the states of the empty prompt and what of them is said, as a
    batch of one."""

    def __init__(self, teacher: ZImageTransformer2DModel, nothing: tuple[Tensor, Tensor], draw: Draw) -> None:
        self._teacher = teacher
        self._nothing = nothing
        self._draw = draw

    @torch.no_grad()
    def __call__(self, batch: Noisy) -> Tensor:
        """The output for a batch, float32 `[n, 16, height, width]`."""
        told = self._draw(self._teacher, batch.mixed, batch.sigma, batch.states, batch.said)[0].float()
        states, said = (one.expand(len(told), *one.shape[1:]).contiguous() for one in self._nothing)
        return told + GUIDANCE * (told - self._draw(self._teacher, batch.mixed, batch.sigma, states, said)[0].float())


def distil_guidance(
    learnt: Learnt, dit: ZImageTransformer2DModel, batches: TextBatches, see: Vision, folder: Path, device: torch.device
) -> None:
    """Trains the DiT in place to answer what it now answers with guidance, in the pictures' colours."""
    torch.manual_seed(7)
    learnt.text.requires_grad_(requires_grad=False)
    use_real_rotation(dit)
    teacher = copy.deepcopy(dit).requires_grad_(requires_grad=False)
    noisy = NoisyBatches(learnt, batches, see, folder / "latents", device, seed=9_000_000)
    draw = Draw()
    with torch.autocast(device.type, torch.bfloat16):
        guided = Guided(teacher, noisy.nothing(), draw)

    def losses(step: int) -> Losses:
        with torch.autocast(device.type, torch.bfloat16):
            batch = noisy.of_step(step)
            goal = batch.flow if batch.blended else guided(batch)
            output = draw(dit, batch.mixed, batch.sigma, batch.states, batch.said)[0].float()
        weights = balance(around_things(batch.latents))
        if batch.blended:
            return {"blended": (weights * (output - goal).pow(2)).mean()}
        things = named_things(batch)
        goal = goal - over_things(goal - batch.flow, things)
        wrong = over_things(output - goal, things)
        return {
            "guided": (weights * (output - goal).pow(2)).mean(),
            "colours": COLOURS_WEIGHT * (weights * wrong.pow(2)).mean(),
        }

    run_stage("guidance", {"dit": dit}, SCHEDULE, losses, folder)


def named_things(batch: Noisy) -> Tensor:
    """Which latents show each thing whose colour the prompt names: bool `[n, things, height, width]`."""
    named = torch.tensor([example.names_colours for example in batch.examples])[:, None, None, None]
    return shown_things([example.scene for example in batch.examples], batch.latents) & named.to(batch.latents.device)


def over_things(values: Tensor, things: Tensor) -> Tensor:
    """The mean over each thing of `values` `[n, channels, height, width]` wherever the thing is, 0 elsewhere."""
    return torch.einsum("ntc,nthw->nchw", means_over(values, things), things.to(values))


def means_over(values: Tensor, things: Tensor) -> Tensor:
    """The mean over each thing, bool `[n, things, height, width]`, of `values` `[n, channels, height, width]`: `[n,
    things, channels]`, 0 for a thing that is nowhere."""
    masks = things.to(values)
    return torch.einsum("nthw,nchw->ntc", masks, values) / masks.sum((2, 3)).clamp(min=1)[..., None]
