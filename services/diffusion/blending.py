"""Blends the hidden states of reference pictures into those of a prompt. Pure functions from tensors to tensors.

`text` is [tokens, width], already within the DiT's limit; a `reference` is [any tokens, width]. What comes out is
[tokens, width] in the text's dtype, computed in float32. Alpha is the reference's share: 0 gives the text bit for bit.
The modes are those of the public API; how a mode that it only names is computed stands with its function.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch.nn import functional

from services.diffusion.fitting import interpolate
from shared.schemas.diffusion import Blending
from shared.schemas.fields import BlendMode, OutlierMasking

NEIGHBOURS = 2  # tokens on each side that a token is compared with
STANDS_OUT, STEEPNESS = 2.0, 4
"""A token that is so many times as salient as the mean keeps half of its text; how fast that share rises around it."""
OUTLIER_FACTOR = 10.0
"""A dimension is an outlier when it spreads more than so many times as far as the text's own does."""


class Weights(Protocol):
    """The reference's share for each number."""

    def __call__(self, text: torch.Tensor, blending: Blending) -> torch.Tensor:
        """Shares in [0, 1] that broadcast to `text` [tokens, width], float32."""


def resample(reference: torch.Tensor, tokens: int) -> torch.Tensor:
    """The reference [any, width] at another length, linearly between neighbours, both ends kept: [tokens, width]."""
    return reference if reference.shape[0] == tokens else interpolate(reference, tokens)


def combine(references: Sequence[torch.Tensor], alphas: Sequence[float], tokens: int) -> torch.Tensor:
    """Several references as one, float32 [tokens, width]: their mean, each weighing as much as its alpha."""
    resampled = [resample(reference.to(torch.float32), tokens) for reference in references]
    total = sum(alphas)
    if len(resampled) == 1 or total == 0:
        return resampled[0]
    return torch.stack([states * (alpha / total) for states, alpha in zip(resampled, alphas, strict=True)]).sum(0)


def linear(text: torch.Tensor, blending: Blending) -> torch.Tensor:
    """Alpha for every number, [1, 1]."""
    return torch.full((1, 1), blending.alpha, device=text.device)


def style_only(text: torch.Tensor, blending: Blending) -> torch.Tensor:
    """Alpha for the last dimensions, 0 for the others: [1, width]. How many is `style_share`, rounded, at least one."""
    width = text.shape[1]
    last = max(1, round(width * blending.style_share))
    weights = torch.zeros(1, width, device=text.device)
    weights[:, width - last :] = blending.alpha
    return weights


def graduated(text: torch.Tensor, blending: Blending) -> torch.Tensor:
    """From 0 at the first token to alpha at the last, in equal steps: [tokens, 1]. A single token has alpha."""
    tokens = text.shape[0]
    if tokens == 1:
        return linear(text, blending)
    return torch.linspace(0.0, blending.alpha, tokens, device=text.device)[:, None]


def attention_weighted(text: torch.Tensor, blending: Blending) -> torch.Tensor:
    """Less alpha for tokens that stand out from their neighbours: `alpha / (1 + (s / (2 m)) ** 4)`, [tokens, 1].

    `s` is a token's salience (see there) and `m` the mean of all. Only who stands out is to be spared, and alpha 1
    means the reference alone, so a token of middling salience has 16/17 of alpha; one with `STANDS_OUT` times the mean
    has half, one with twice that 1/17. Where all are alike each has 16/17: never the same as linear.
    """
    salience = token_salience(text)
    mean = salience.mean()
    relative = torch.where(mean > 0, salience / mean, torch.ones_like(salience))
    return (blending.alpha / (1 + (relative / STANDS_OUT) ** STEEPNESS))[:, None]


def token_salience(text: torch.Tensor) -> torch.Tensor:
    """How far each token points away from its neighbours, [tokens] in [0, 2]: 1 minus the cosine of the angle between
    it and the mean of up to `NEIGHBOURS` tokens on either side, the measure by which `fitting.attention_pool` goes."""
    rows = text.to(torch.float32)
    tokens = rows.shape[0]
    if tokens == 1:
        return torch.zeros(1, device=text.device)
    index = torch.arange(tokens, device=text.device)
    apart = (index[:, None] - index[None, :]).abs()
    near = ((apart > 0) & (apart <= NEIGHBOURS)).to(torch.float32)
    return (1 - functional.cosine_similarity(rows, near @ rows / near.sum(1, keepdim=True), dim=-1)).clamp(min=0)


WEIGHTS: Mapping[BlendMode, Weights] = {
    BlendMode.LINEAR: linear,
    BlendMode.STYLE_ONLY: style_only,
    BlendMode.GRADUATED: graduated,
    BlendMode.ATTENTION_WEIGHTED: attention_weighted,
}


def mask_outliers(reference: torch.Tensor, text: torch.Tensor, masking: OutlierMasking) -> torch.Tensor:
    """The reference [tokens, width] with its outlier dimensions made harmless, float32.

    A dimension's spread is its standard deviation over tokens; it is an outlier when that is over `OUTLIER_FACTOR`
    times the text's in the same dimension, or the median of the text's spreads where that is more. `zero` empties such
    a dimension, `clamp` keeps its values within the bound around the text's mean, `scale` gives it the text's spread
    and mean. With `off` nothing changes.
    """
    states = reference.to(torch.float32)
    if masking is OutlierMasking.OFF:
        return states
    rows = text.to(torch.float32)
    mean, spread = rows.mean(0), rows.std(0, correction=0)
    usual = torch.maximum(spread, spread.median())
    bound, own = OUTLIER_FACTOR * usual, states.std(0, correction=0)
    match masking:
        case OutlierMasking.ZERO:
            harmless = torch.zeros_like(states)
        case OutlierMasking.CLAMP:
            harmless = torch.minimum(torch.maximum(states, mean - bound), mean + bound)
        case _:
            harmless = (states - states.mean(0)) * (usual / own.clamp(min=torch.finfo(own.dtype).tiny)) + mean
    return torch.where(own > bound, harmless, states)


def blend(text: torch.Tensor, references: Sequence[torch.Tensor], blending: Blending) -> torch.Tensor:
    """The text with the references in it, [tokens, width] in the text's dtype. Alpha 1 in `linear` gives the resampled
    reference."""
    if not references:
        return text
    masked = [mask_outliers(reference, text, blending.outlier_masking) for reference in references]
    reference = combine(masked, blending.alphas, text.shape[0])
    weights = WEIGHTS[blending.mode](text, blending).expand_as(reference)
    blended = torch.lerp(text.to(torch.float32), reference, weights).to(text.dtype)
    return torch.where(weights == 0, text, blended)  # bit for bit, zeros below zero too
