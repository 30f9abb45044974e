"""Z-Image with random weights that are made on the device: the published size takes seconds instead of a download."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from zimage.checkpoints import AXES_LENS, LATENT_CHANNELS, SCALING_FACTOR, SHIFT_FACTOR

SHIFT = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Widths and depths; the DiT's width is `heads * sum(axes_dims)`."""

    heads: int
    axes_dims: tuple[int, int, int]
    layers: int
    refiner_layers: int
    text_width: int
    text_layers: int
    text_heads: int
    vae_channels: tuple[int, int, int, int]
    vae_layers: int


SIZES = {
    "full": Sizes(  # as published: 6 billion numbers, an encoder of 4 billion
        heads=30,
        axes_dims=(32, 48, 48),
        layers=30,
        refiner_layers=2,
        text_width=2560,
        text_layers=36,
        text_heads=32,
        vae_channels=(128, 256, 512, 512),
        vae_layers=2,
    ),
    "small": Sizes(
        heads=4,
        axes_dims=(16, 24, 24),
        layers=4,
        refiner_layers=1,
        text_width=128,
        text_layers=4,
        text_heads=4,
        vae_channels=(32, 64, 64, 64),
        vae_layers=1,
    ),
}


@dataclass(slots=True)
class Models:
    """The parts, in bfloat16 on the device; `transformer` is never changed, options get a copy."""

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


def make_models(size: Sizes, device: torch.device) -> Models:
    """Makes the parts, the same for the same device."""
    torch.manual_seed(0)
    with _made_there(device):
        transformer = ZImageTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            dim=size.heads * sum(size.axes_dims),
            n_layers=size.layers,
            n_refiner_layers=size.refiner_layers,
            n_heads=size.heads,
            n_kv_heads=size.heads,
            cap_feat_dim=size.text_width,
            axes_dims=list(size.axes_dims),
            axes_lens=list(AXES_LENS),
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=size.vae_channels,
            layers_per_block=size.vae_layers,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=32,
            scaling_factor=SCALING_FACTOR,
            shift_factor=SHIFT_FACTOR,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=False,
        )
        encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=151_936 if size.text_layers > 4 else 1_000,
                hidden_size=size.text_width,
                intermediate_size=int(size.text_width * 3.8),
                num_hidden_layers=size.text_layers,
                num_attention_heads=size.text_heads,
                num_key_value_heads=max(1, size.text_heads // 4),
                head_dim=128 if size.text_width > 1_000 else 32,
            )
        )
    for part in (transformer, vae, encoder):
        part.eval().requires_grad_(requires_grad=False)
    return Models(transformer, vae, encoder, device)


def free(device: torch.device) -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def parameters_of(part: Any) -> int:
    """How many numbers a part has."""
    return sum(int(weight.numel()) for weight in part.parameters())


def step_flops(transformer: Any, tokens: int) -> float:
    """Floating point operations of one picture's step: two for each weight of a block and token, and attention's."""
    config = transformer.config
    blocks = [*transformer.layers, *transformer.noise_refiner]  # the text's own blocks see a few tokens only
    weights = sum(parameters_of(block) for block in blocks)
    return 2.0 * weights * tokens + 4.0 * config.dim * tokens**2 * len(blocks)


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
