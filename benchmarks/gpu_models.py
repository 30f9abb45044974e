"""Z-Image with random weights that are made on the device: the published size takes seconds instead of a download."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

from zimage.architecture import Shape, make_text_encoder, make_transformer, make_vae

SHIFT = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A shape, what is drawn with it, and the matrices that tell what the device can do, all in pixels or numbers."""

    shape: Shape
    vocabulary: int
    sides: tuple[int, ...]
    matrix: int


PUBLISHED = Size(  # 6 billion numbers, and a text encoder of 4 billion
    shape=Shape(
        text_width=2560,
        text_layers=36,
        text_heads=32,
        text_head_width=128,
        text_inner_width=9728,
        heads=30,
        axes_dims=(32, 48, 48),
        layers=30,
        refiner_layers=2,
        vae_channels=(128, 256, 512, 512),
        vae_layers=2,
        vae_groups=32,
    ),
    vocabulary=151_936,
    sides=(1024, 512),
    matrix=8192,
)
TINY = Size(
    shape=Shape(
        text_width=64,
        text_layers=2,
        text_heads=4,
        heads=4,
        axes_dims=(8, 4, 4),
        layers=2,
        refiner_layers=1,
        vae_channels=(8, 16, 16, 16),
    ),
    vocabulary=1_000,
    sides=(128, 64),
    matrix=256,
)


@dataclass(frozen=True, slots=True)
class Models:
    """The parts, in bfloat16 on the device. They are never changed: options get copies."""

    transformer: Any
    vae: Any
    encoder: Any
    device: torch.device

    def pipeline(self) -> Any:
        """diffusers' pipeline of these parts, which is given embeddings."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        return ZImagePipeline(
            transformer=self.transformer, vae=self.vae, scheduler=scheduler, text_encoder=None, tokenizer=None
        )


def make_models(size: Size, device: torch.device) -> Models:
    """Makes the parts, the same for the same device."""
    torch.manual_seed(0)
    with _made_there(device):
        transformer, vae = make_transformer(size.shape), make_vae(size.shape)
        encoder = make_text_encoder(size.shape, size.vocabulary).model
    for part in (transformer, vae, encoder):
        part.eval().requires_grad_(requires_grad=False)
    return Models(transformer, vae, encoder, device)


def numbers_of(part: Any) -> int:
    """How many numbers a part has."""
    return sum(int(weight.numel()) for weight in part.parameters())


def step_operations(transformer: Any, tokens: int) -> float:
    """Floating point operations of one picture's step: two for each weight of a block and token, and attention's.

    The text's own blocks, which see a few tokens only, are left out, and so are the VAE's at the end.
    """
    blocks = [*transformer.layers, *transformer.noise_refiner]
    weights, width = sum(numbers_of(block) for block in blocks), int(transformer.config.dim)
    return 2.0 * weights * tokens + 4.0 * width * tokens**2 * len(blocks)


@contextmanager
def _made_there(device: torch.device) -> Iterator[None]:
    """What is made within is made on the device, in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
