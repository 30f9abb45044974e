"""What a checkpoint is loaded into, and what is told of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from services.diffusion.adapters import Adapters
from services.diffusion.cores import Cores
from services.diffusion.preview import PreviewMap


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a caller may want to know of the loaded checkpoint. `text_limit` is in tokens; pictures may be as wide and
    high as the DiT has positions; `fingerprint` is equal where the same request gives the same picture, but for a
    device's rounding."""

    device: str
    dtype: str
    text_width: int
    text_limit: int
    max_width_px: int
    max_height_px: int
    name: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a checkpoint was loaded into: the transformer, which may or may not take masks, and its LoRAs; the VAE, and
    how its latents look; where each computes, its weights may lie elsewhere; the noise scheduler's configuration.
    `before_picture` is for a transformer that remembers steps: it is called with their number, and then there is one
    picture at a time. `weight_bytes` lie on the transformer's device while it computes."""

    transformer: Any
    vae: Any
    device: torch.device
    vae_device: torch.device
    weight_bytes: int
    scheduler_config: Mapping[str, Any]
    adapters: Adapters
    takes_masks: bool = True
    preview: PreviewMap | None = None
    before_picture: Callable[[int], None] | None = None
    cores: Cores = field(default_factory=lambda: Cores(1))
