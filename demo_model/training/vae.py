"""First stage: a narrow AutoencoderKL of the published kind (16 latent channels, factor 8) for our pictures."""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from demo_model.render import render
from demo_model.training.loop import Losses, Schedule, run_stage
from demo_model.world import random_scene

SCHEDULE = Schedule(steps=6000, learning_rate=2e-3, weight_decay=0.0)
BATCH = 16
CROP = 64
KL_WEIGHT = 2e-4
STATISTICS_PICTURES = 256


def new_vae() -> AutoencoderKL:
    """The VAE with random weights; its scaling and shift are measured after training."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def pixels(pictures: list[np.ndarray]) -> Tensor:
    """Pictures `[height, width, 3]` uint8 as `[n, 3, height, width]` float32 in -1..1."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return (stacked / 127.5 - 1).contiguous()


def train_vae(folder: Path, device: torch.device) -> AutoencoderKL:
    """The trained VAE, with `scaling_factor` and `shift_factor` measured so that latents have mean 0 and spread 1."""
    torch.manual_seed(0)
    vae = new_vae().to(device)
    run_stage("vae", {"vae": vae}, SCHEDULE, lambda step: _losses(vae, step, device), folder)
    _measure(vae, device)
    return vae.eval()


def _losses(vae: AutoencoderKL, step: int, device: torch.device) -> Losses:
    rng = random.Random(1_000_000 + step)
    batch = pixels([_crop(rng) for _ in range(BATCH)]).to(device)
    generator = torch.Generator().manual_seed(step)
    with torch.autocast(device.type, torch.bfloat16):
        latents = vae.encode(batch).latent_dist
        noise = torch.randn(latents.mean.shape, generator=generator).to(device)
        decoded = vae.decode(latents.mean + latents.std * noise).sample
    error = (decoded.float() - batch).abs()
    kl = latents.kl().mean() / latents.mean[0].numel()
    return {"l1": error.mean(), "l2": (error**2).mean(), "kl": KL_WEIGHT * kl.float()}


def _crop(rng: random.Random) -> np.ndarray:
    side = rng.choice((128, 128, 192, 256))
    picture = np.asarray(render(random_scene(rng), width=side, height=side, rng=rng))
    for _ in range(3):  # rather a crop with an edge in it than plain background
        left, top = rng.randrange(side - CROP + 1), rng.randrange(side - CROP + 1)
        crop = picture[top : top + CROP, left : left + CROP]
        if crop.std(axis=(0, 1)).max() > 10:
            return crop
    return crop


@torch.no_grad()
def _measure(vae: AutoencoderKL, device: torch.device) -> None:
    rng = random.Random(2_000_000)
    sums = []
    for _ in range(STATISTICS_PICTURES // 16):
        pictures = [np.asarray(render(random_scene(rng), width=128, height=128, rng=rng)) for _ in range(16)]
        sums.append(vae.encode(pixels(pictures).to(device)).latent_dist.mean.float())
    latents = torch.cat(sums)
    vae.register_to_config(
        scaling_factor=round(1 / float(latents.std()), 4), shift_factor=round(float(latents.mean()), 4)
    )
