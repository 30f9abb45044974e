"""Guidance away from the negative prompt, as diffusers' `ZImagePipeline` computes it. Pure functions of tensors."""

from collections.abc import Sequence

import torch


def guide(positive: torch.Tensor, negative: torch.Tensor, *, scale: float, normalization: float) -> torch.Tensor:
    """`positive + scale * (positive - negative)`, float32 of the same shape.

    With `normalization` above 0 the result is shortened to at most that many times the length of `positive`.
    """
    guided = positive + scale * (positive - negative)
    if not normalization:
        return guided
    length, longest = torch.linalg.vector_norm(guided), torch.linalg.vector_norm(positive) * normalization
    return torch.where(length > longest, guided * (longest / length), guided)


def guided_steps(timesteps: torch.Tensor, truncation: float) -> Sequence[bool]:
    """For each step whether it has guidance: it ends once more than the share `truncation` of the way is done."""
    done: list[float] = ((1000 - timesteps.float()) / 1000).tolist()
    return [share <= truncation for share in done]
