"""Z-Image's architecture in any size, with random weights: made where and in the dtype that torch's defaults say."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

AXES_LENS = (1536, 512, 512)  # of the published checkpoint: 1504 tokens of text, 512 patches a side
LATENT_CHANNELS = 16
SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the parts; the DiT's width is `heads * sum(axes_dims)`. What has a default is of small models."""

    text_width: int
    text_layers: int
    text_heads: int
    heads: int
    axes_dims: tuple[int, int, int]
    layers: int
    refiner_layers: int
    vae_channels: tuple[int, int, int, int]
    vae_attention: bool = True
    vae_layers: int = 1
    vae_groups: int = 8
    text_head_width: int | None = None
    text_inner_width: int | None = None
    vision_layers: int = 2


def make_text_encoder(shape: Shape, vocabulary: int) -> Any:
    """A Qwen3 causal language model."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=shape.text_width,
        intermediate_size=shape.text_inner_width or 3 * shape.text_width,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_heads,
        num_key_value_heads=max(1, shape.text_heads // 4),
        head_dim=shape.text_head_width or shape.text_width // shape.text_heads,
        max_position_embeddings=40_960,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def make_transformer(shape: Shape) -> Any:
    """A Z-Image DiT."""
    model = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=shape.heads * sum(shape.axes_dims),
        n_layers=shape.layers,
        n_refiner_layers=shape.refiner_layers,
        n_heads=shape.heads,
        n_kv_heads=shape.heads,
        cap_feat_dim=shape.text_width,
        axes_dims=list(shape.axes_dims),
        axes_lens=list(AXES_LENS),
    )
    for token in (model.x_pad_token, model.cap_pad_token):  # zeros by default, which would hide errors of padding
        torch.nn.init.normal_(token, std=0.02)
    return model


def make_vae(shape: Shape) -> Any:
    """The VAE, with the published scaling of its latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=shape.vae_channels,
        layers_per_block=shape.vae_layers,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=shape.vae_groups,
        mid_block_add_attention=shape.vae_attention,
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )
