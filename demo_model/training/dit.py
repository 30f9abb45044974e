"""The small Z-Image DiT and a forward of it for training: whole batches of one size, and rotations in real numbers.

`ZImageTransformer2DModel.forward` takes lists and turns with complex numbers, whose gradients are several times slower
on a CPU. `predict` computes the same from the same modules; a test holds the two against each other.
"""

from functools import lru_cache
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from demo_model.training.text import WIDTH

AXES_LENS = (1536, 512, 512)  # of the published checkpoint
AXES_DIMS = (16, 24, 24)
PATCH = 2
MULTIPLE = 32  # both sequences are filled up to a multiple of this
DIM = 256
LAYERS = 5
GATE = 0.3  # mean bias of the gates before their tanh, with random weights

Rotation = tuple[Tensor, Tensor]


def new_dit() -> ZImageTransformer2DModel:
    """The DiT with random weights."""
    model = ZImageTransformer2DModel(
        in_channels=16,
        dim=DIM,
        n_layers=LAYERS,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=WIDTH,
        axes_dims=list(AXES_DIMS),
        axes_lens=list(AXES_LENS),
    )
    for token in (model.x_pad_token, model.cap_pad_token):
        nn.init.normal_(token, std=0.02)
    with torch.no_grad():  # gates near 0 would let too little of the text through to learn from
        for block in (*model.layers, *model.noise_refiner):
            _, of_attention, _, of_feed_forward = block.adaLN_modulation[0].bias.view(4, -1)
            of_attention += GATE
            of_feed_forward += GATE
    return model


class RealRotation:
    """Attention processor of the training: as diffusers' own, with `(cos, sin)` in place of complex numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,  # noqa: ARG002 - of the interface
        attention_mask: Tensor | None = None,  # noqa: ARG002 - of the interface
        freqs_cis: Rotation | None = None,
    ) -> Tensor:
        if freqs_cis is None:
            raise ValueError("this processor needs the rotations")
        cos, sin = freqs_cis
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1))

        def turned(projection: Any, norm: Any) -> Tensor:
            x = norm(projection(hidden_states).unflatten(-1, (attn.heads, -1))).float()
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            both = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
            return both.to(value.dtype).transpose(1, 2)

        mixed = nn.functional.scaled_dot_product_attention(
            turned(attn.to_q, attn.norm_q), turned(attn.to_k, attn.norm_k), value.transpose(1, 2)
        )
        output: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return output


def use_real_rotation(model: ZImageTransformer2DModel) -> None:
    """Prepares a DiT for `predict`."""
    for block in (*model.layers, *model.noise_refiner, *model.context_refiner):
        block.attention.set_processor(RealRotation())


def predict(model: ZImageTransformer2DModel, noisy: Tensor, time: Tensor, states: Tensor, said: Tensor) -> Tensor:
    """The DiT's output for a batch, float `[n, 16, height, width]`; the arguments are `predict_and_show`'s."""
    return predict_and_show(model, noisy, time, states, said)[0]


def predict_and_show(
    model: ZImageTransformer2DModel, noisy: Tensor, time: Tensor, states: Tensor, said: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The DiT's output, and what the image tokens are after each of its layers, each `[n, patches, dim]`.

    Args:
        model: a DiT after `use_real_rotation`.
        noisy: latents `[n, 16, height, width]`.
        time: `[n]`, 1 - sigma.
        states: hidden states of the prompts `[n, tokens, WIDTH]`, filled up to a multiple of 32.
        said: bool `[n, tokens]`, False where `states` is only filling.
    """
    count, channels, height, width = noisy.shape
    rows, columns = height // PATCH, width // PATCH
    key = f"{PATCH}-1"
    modulation = model.t_embedder(time * model.t_scale)
    patches = noisy.view(count, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 3, 5, 1)
    image = model.all_x_embedder[key](patches.reshape(count, rows * columns, -1))
    filling = -image.shape[1] % MULTIPLE
    if filling:
        image = torch.cat([image, model.x_pad_token.to(image.dtype).expand(count, filling, -1)], 1)
    of_image, of_text, of_all = _rotations(model, states.shape[1], rows, columns, noisy.device)
    for block in model.noise_refiner:
        image = block(image, None, of_image, modulation)
    text = model.cap_embedder(states)
    text = torch.where(said[..., None], text, model.cap_pad_token.to(text.dtype))
    for block in model.context_refiner:
        text = block(text, None, of_text)
    unified = torch.cat([image, text], 1)
    shown: list[Tensor] = []
    for block in model.layers:
        unified = block(unified, None, of_all, modulation)
        shown.append(unified[:, : rows * columns])
    output = model.all_final_layer[key](unified, c=modulation)[:, : rows * columns]
    output = output.view(count, rows, columns, PATCH, PATCH, channels).permute(0, 5, 1, 3, 2, 4)
    latents: Tensor = output.reshape(count, channels, height, width)
    return latents, shown


def _rotations(
    model: ZImageTransformer2DModel, tokens: int, rows: int, columns: int, device: torch.device
) -> tuple[Rotation, Rotation, Rotation]:
    image, text = _positions(tokens, rows, columns)
    return (
        _rotation(model, image.to(device)),
        _rotation(model, text.to(device)),
        _rotation(model, torch.cat([image, text]).to(device)),
    )


def _rotation(model: ZImageTransformer2DModel, positions: Tensor) -> Rotation:
    turns = model.rope_embedder(positions)
    return turns.real[None, :, None].contiguous(), turns.imag[None, :, None].contiguous()


@lru_cache(maxsize=64)
def _positions(tokens: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    grid = torch.meshgrid(torch.tensor([tokens + 1]), torch.arange(rows), torch.arange(columns), indexing="ij")
    image = torch.stack(grid, -1).flatten(0, 2).int()
    filling = torch.zeros(-len(image) % MULTIPLE, 3, dtype=torch.int32)
    text = torch.zeros(tokens, 3, dtype=torch.int32)
    text[:, 0] = torch.arange(1, tokens + 1)
    return torch.cat([image, filling]), text
