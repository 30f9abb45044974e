"""The noise schedule and the first noise of a picture, as diffusers' `ZImagePipeline` makes them.

Source: `pipelines/z_image/pipeline_z_image.py` and `FlowMatchEulerDiscreteScheduler` of diffusers 0.42.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

BASE_TOKENS, MAX_TOKENS = 256, 4096
BASE_SHIFT, MAX_SHIFT = 0.5, 1.15
"""`mu` of a schedule with dynamic shifting rises linearly between these numbers of image tokens; such a checkpoint
may name others. The published ones shift statically and ignore it."""


def make_scheduler(
    config: Mapping[str, Any], *, steps: int, shift: float, image_tokens: int, device: torch.device
) -> Any:
    """A scheduler of this picture's own, with its `timesteps` set: float32 [steps], from 1000 down.

    Before shifting the sigmas are `linspace(1, 1/N, N)`, so N steps are N calls of the DiT; the shift makes of each
    `s * sigma / (1 + (s - 1) * sigma)`. `image_tokens` is the number of patches, for checkpoints that shift by size.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift)
    sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
    scheduler.set_timesteps(steps, device=device, sigmas=sigmas, mu=_mu(config, image_tokens))
    scheduler.set_begin_index(0)
    return scheduler


def first_noise(seed: int, *, channels: int, height: int, width: int) -> torch.Tensor:
    """Noise of the seed, float32 [channels, height, width] in latent cells, drawn on the CPU.

    The CPU's generator gives the same numbers everywhere, so a seed means the same noise on every device.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, channels, height, width), generator=generator, dtype=torch.float32)[0]


def _mu(config: Mapping[str, Any], image_tokens: int) -> float:
    base, most = config.get("base_image_seq_len", BASE_TOKENS), config.get("max_image_seq_len", MAX_TOKENS)
    low, high = config.get("base_shift", BASE_SHIFT), config.get("max_shift", MAX_SHIFT)
    slope = (high - low) / (most - base)
    return float(image_tokens * slope + (low - slope * base))
