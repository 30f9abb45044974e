"""Fits embeddings that are longer than the DiT's text limit into it. Pure functions from tensors to tensors.

Every function takes `[tokens, width]` and answers `[limit, width]` in the same dtype; with `tokens <= limit` nothing
is changed. Weighted sums are made in float32.
"""

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from services.diffusion.shapes import SEQUENCE_MULTIPLE
from shared.schemas.fields import LongPromptMode


def text_limit(caption_positions: int) -> int:
    """Tokens of text that fit a rotary axis of `caption_positions` entries (`axes_lens[0]` of the DiT).

    The padded caption takes positions 1..ceil32(n) and the image stands at ceil32(n) + 1, so
    `32 * floor((positions - 2) / 32)`: 1504 for 1536 positions, 992 for 1024.
    """
    return SEQUENCE_MULTIPLE * ((caption_positions - 2) // SEQUENCE_MULTIPLE)


def truncate(embeddings: torch.Tensor, limit: int) -> torch.Tensor:
    """Keeps the first `limit` tokens."""
    return embeddings[:limit]


def interpolate(embeddings: torch.Tensor, limit: int) -> torch.Tensor:
    """Resamples along the sequence, linearly between neighbours; the first and the last token stay as they are."""
    rows = embeddings.to(torch.float32).T.unsqueeze(0)
    resampled = functional.interpolate(rows, size=limit, mode="linear", align_corners=True)
    return resampled.squeeze(0).T.to(embeddings.dtype)


def pool(embeddings: torch.Tensor, limit: int) -> torch.Tensor:
    """The mean of each of `limit` windows that cover the sequence (adaptive average pooling)."""
    rows = embeddings.to(torch.float32).T.unsqueeze(0)
    return functional.adaptive_avg_pool1d(rows, limit).squeeze(0).T.to(embeddings.dtype)


def attention_pool(embeddings: torch.Tensor, limit: int) -> torch.Tensor:
    """Like `pool`, but within a window a token weighs the more, the more it stands out.

    The weights are a softmax over the window of `1 - cos(token, mean of the window)`, scaled by the square root of the
    window's length: tokens that repeat their neighbours share one voice, rare ones keep theirs.
    """
    rows = embeddings.to(torch.float32)
    tokens = rows.shape[0]
    index = torch.arange(limit, device=rows.device)
    starts = index * tokens // limit  # the same windows as adaptive average pooling
    lengths = -((-(index + 1) * tokens) // limit) - starts
    offsets = torch.arange(int(lengths.max()), device=rows.device)
    inside = offsets[None, :] < lengths[:, None]  # [limit, longest window]
    windows = rows[(starts[:, None] + offsets[None, :]).clamp(max=tokens - 1)]  # [limit, longest window, width]
    mean = (windows * inside[..., None]).sum(1, keepdim=True) / lengths[:, None, None]
    salience = (1 - functional.cosine_similarity(windows, mean, dim=-1)) * lengths[:, None].sqrt()
    weights = salience.masked_fill(~inside, -torch.inf).softmax(dim=1)
    return torch.einsum("lw,lwd->ld", weights, windows).to(embeddings.dtype)


MODES: Mapping[LongPromptMode, Callable[[torch.Tensor, int], torch.Tensor]] = {
    LongPromptMode.TRUNCATE: truncate,
    LongPromptMode.INTERPOLATE: interpolate,
    LongPromptMode.POOL: pool,
    LongPromptMode.ATTENTION_POOL: attention_pool,
}


def fit(embeddings: torch.Tensor, limit: int, mode: LongPromptMode) -> torch.Tensor:
    """The embeddings, brought to at most `limit` tokens in the way that `mode` names."""
    return embeddings if embeddings.shape[0] <= limit else MODES[mode](embeddings, limit)
