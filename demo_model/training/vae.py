"""First stage: a narrow AutoencoderKL of the published kind (16 latent channels, factor 8) for our pictures.

A palette of a dozen colours is all that pictures of prompts show, and a VAE that sees no others learns no others: what
lay between red and green came out black. But a picture that is pulled towards a reference is between two colours, and
so is one that the DiT has not finished. So a part of the pictures is mixed of two that differ in their colours alone,
and latents are learnt in which what lies between two pictures is what is mixed of them.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from demo_model.render import Tint, render
from demo_model.training.loop import Losses, Schedule, run_stage
from demo_model.world import Colour, Scene, is_held_out, random_scene

LATENT_CHANNELS = 16
SCHEDULE = Schedule(steps=6000, learning_rate=2e-3, weight_decay=0.0)
PLAIN, MIXED = 10, 8
"""Crops of a batch: of pictures, and of three pictures in the same place, the third mixed of the other two."""
CROP = 64
KL_WEIGHT = 2e-4
LINE_WEIGHT = 0.3  # of how far the latents of what is mixed are from the mixed latents
STATISTICS_PICTURES = 256


def new_vae() -> AutoencoderKL:
    """The VAE with random weights; its scaling and shift are measured after training."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
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
    run_stage("vae", {"vae": vae}, SCHEDULE, lambda step: vae_losses(vae, step, device), folder)
    _measure(vae, device)
    return vae.eval()


def vae_losses(vae: AutoencoderKL, step: int, device: torch.device) -> Losses:
    """What the VAE makes wrong of the crops of a step."""
    rng = random.Random(1_000_000 + step)
    plain = [crop for _ in range(PLAIN) for crop in _crops(rng, [_picture(random_scene(rng), rng.random())])]
    ones, others, between, alphas = zip(*(mixed_crops(rng) for _ in range(MIXED)), strict=True)
    batch = pixels([*plain, *ones, *others, *between]).to(device)
    generator = torch.Generator().manual_seed(step)
    with torch.autocast(device.type, torch.bfloat16):
        latents = vae.encode(batch).latent_dist
        one, other, meant = latents.mean.float()[PLAIN:].chunk(3)
        mixed = torch.lerp(one, other, torch.tensor(alphas, device=device)[:, None, None, None])
        noise = torch.randn(latents.mean.shape, generator=generator).to(device)
        shown = torch.cat([latents.mean + latents.std * noise, mixed.to(latents.mean)])
        decoded = vae.decode(shown).sample
    error = (decoded.float() - torch.cat([batch, batch[-MIXED:]])).abs()
    kl = latents.kl().mean() / latents.mean[0].numel()
    return {
        "l1": error.mean(),
        "l2": (error**2).mean(),
        "kl": KL_WEIGHT * kl.float(),
        "line": LINE_WEIGHT * (meant - mixed).pow(2).mean(),
    }


Picture = Callable[[int], np.ndarray]
"""Draws a picture as wide and high as it is told, uint8 `[side, side, 3]`."""


def _picture(scene: Scene, seed: float, tint: Tint | None = None) -> Picture:
    return lambda side: np.asarray(render(scene, width=side, height=side, rng=random.Random(seed), tint=tint))


def mixed_crops(rng: random.Random) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """A scene, the same in other colours, what is between them, and how far that is from the first, 0 to 1."""
    scene, other = random_scene(rng), None
    while other is None or any(map(is_held_out, other.things)):
        things = tuple(replace(thing, colour=rng.choice(list(Colour))) for thing in scene.things)
        other = Scene(background=rng.choice(list(Colour)), things=things)
    alpha, seed = rng.random(), rng.random()
    tints = (None, Tint(reference=other, alpha=1.0), Tint(reference=other, alpha=alpha))
    first, last, between = _crops(rng, [_picture(scene, seed, tint) for tint in tints])
    return first, last, between, alpha


def _crops(rng: random.Random, pictures: list[Picture]) -> list[np.ndarray]:
    """The same part of each picture, uint8 `[CROP, CROP, 3]`."""
    side = rng.choice((128, 128, 192, 256))
    drawn = [picture(side) for picture in pictures]
    for _ in range(3):  # rather a crop with an edge in it than plain background
        left, top = rng.randrange(side - CROP + 1), rng.randrange(side - CROP + 1)
        crops = [picture[top : top + CROP, left : left + CROP] for picture in drawn]
        if crops[-1].std(axis=(0, 1)).max() > 10:
            break
    return crops


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
