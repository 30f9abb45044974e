"""Last stage: the DiT learns again which colours pictures have, after guidance has exaggerated some of them.

Guidance is needed where little more than the text tells what to draw; at low sigmas the picture tells, and there
guidance only adds contrast (Kynkäänniemi et al., "Applying Guidance in a Limited Interval" (2024)). So the DiT keeps
what it answers at high sigmas, but for the mean over each thing whose colour is named, and learns the flow at low ones.

Blends of a scene with itself in other colours keep colours apart from the rest of what is said. Without them a
combination of colour, shape, pattern and place that training never showed was taken for its neighbour that it did show.
"""

import copy
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from demo_model.seeing import Vision
from demo_model.training.dit import use_real_rotation
from demo_model.training.guidance import colours_loss, named_things, over_things
from demo_model.training.joint import Learnt, around_things, balance
from demo_model.training.loop import Losses, Schedule, run_stage
from demo_model.training.noisy import Draw, Noisy, NoisyBatches
from demo_model.training.text import TextBatches

SCHEDULE = Schedule(steps=4_500, learning_rate=4e-4)
PICTURE_TELLS = 0.75  # sigma below which the picture tells more than the text


def settle_colours(
    learnt: Learnt, dit: ZImageTransformer2DModel, batches: TextBatches, see: Vision, folder: Path, device: torch.device
) -> None:
    """Trains the DiT in place to answer what it now answers at high sigmas, in the pictures' colours, and below them
    the flow."""
    torch.manual_seed(8)
    learnt.text.requires_grad_(requires_grad=False)
    use_real_rotation(dit)
    teacher = copy.deepcopy(dit).requires_grad_(requires_grad=False)
    noisy = NoisyBatches(learnt, batches, see, folder / "latents", device, seed=10_000_000)
    draw = Draw()

    def losses(step: int) -> Losses:
        with torch.autocast(device.type, torch.bfloat16):
            batch = noisy.of_step(step)
            output = draw(dit, batch, batch.states, batch.said)[0].float()
        weights = balance(around_things(batch.latents))
        if batch.blended:
            return {"blended": (weights * (output - batch.flow).pow(2)).mean()}
        things = named_things(batch)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            told = draw(teacher, batch, batch.states, batch.said)[0].float()
        goal = kept(batch, told, things)
        return {
            "kept": (weights * (output - goal).pow(2)).mean(),
            "colours": colours_loss(output - goal, weights, things),
        }

    run_stage("colours", {"dit": dit}, SCHEDULE, losses, folder)


def kept(batch: Noisy, told: Tensor, things: Tensor) -> Tensor:
    """What the DiT is to answer where the teacher has `told` it: the flow at low sigmas, above them what was told with
    the flow's mean over each of `things`; all `[n, 16, height, width]`."""
    coloured = told - over_things(told - batch.flow, things)
    high = (batch.sigma > PICTURE_TELLS)[:, None, None, None]
    return torch.where(high, coloured, batch.flow)
