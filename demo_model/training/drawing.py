"""Sixth stage: the DiT alone learns to draw what the finished text says.

The language model no longer changes, so a step costs half of one before, and more of them fit into the same time. They
look at the noisiest sigmas most, where only the text tells what will be drawn. Beside the flow it learns what `reading`
asks of its image tokens.
"""

from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel

from demo_model.seeing import Vision
from demo_model.training.dit import use_real_rotation
from demo_model.training.joint import Learnt, flow_loss
from demo_model.training.loop import Losses, Schedule, run_stage
from demo_model.training.noisy import Draw, NoisyBatches
from demo_model.training.reading import PatchReader, reading_losses
from demo_model.training.text import TextBatches

SCHEDULE = Schedule(steps=31_500, learning_rate=1.6e-3)


def train_drawing(
    learnt: Learnt, dit: ZImageTransformer2DModel, batches: TextBatches, see: Vision, folder: Path, device: torch.device
) -> None:
    """Trains the DiT further in place; the language models and the VAE stay as they are."""
    torch.manual_seed(6)
    learnt.text.requires_grad_(requires_grad=False)
    use_real_rotation(dit)
    noisy = NoisyBatches(learnt, batches, see, folder / "latents", device, seed=8_000_000)
    reader = PatchReader().to(device)
    draw = Draw()

    def losses(step: int) -> Losses:
        with torch.autocast(device.type, torch.bfloat16):
            batch = noisy.of_step(step)
            output, shown = draw(dit, batch.mixed, batch.sigma, batch.states, batch.said)
        flow = flow_loss(output.float(), batch.latents, batch.noise)
        return {"flow": flow, **reading_losses(reader, shown, batch.examples, batch.latents)}

    run_stage("drawing", {"dit": dit, "reader": reader}, SCHEDULE, losses, folder)
