"""Small pictures straight from latents: a linear map to colours, fitted to the VAE once. Pure functions of tensors.

The VAE is nearly linear in what a thumbnail shows, so sixteen channels times three colours replace its decoder.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

EXAMPLE_PX = 256  # a side of the example, which has 1024 cells for the 17 numbers of each colour
EXAMPLE_SEED = 0


@dataclass(frozen=True, slots=True)
class PreviewMap:
    """`weights` [3, channels + 1], float32: the last column is the colour of latents that are zero."""

    weights: torch.Tensor

    def draw(self, latents: torch.Tensor) -> Any:
        """A numpy array uint8 [height, width, 3] of latents [channels, height, width], a pixel for each cell."""
        cells = _with_ones(latents.float().flatten(1).T)
        colours = (cells @ self.weights.to(cells.device).T).T.reshape(3, *latents.shape[1:])
        pixels = ((colours * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.permute(1, 2, 0).contiguous().cpu().numpy()


def fit_preview(latents: torch.Tensor, pixels: torch.Tensor) -> PreviewMap:
    """The map that comes nearest to `pixels` [3, 8 * height, 8 * width], -1 to 1, from `latents` [channels, height,
    width], by least squares."""
    small = functional.adaptive_avg_pool2d(pixels.float().cpu(), (latents.shape[1], latents.shape[2]))
    cells = _with_ones(latents.float().cpu().flatten(1).T)
    solution = torch.linalg.lstsq(cells, small.flatten(1).T, driver="gelsd").solution
    return PreviewMap(solution.T.contiguous())


def example_picture(side: int = EXAMPLE_PX) -> torch.Tensor:
    """A picture to fit with: smooth colours and hard edges, [3, side, side], -1 to 1, always the same."""
    generator = torch.Generator().manual_seed(EXAMPLE_SEED)
    layers = [torch.rand((1, 3, cells, cells), generator=generator) for cells in (4, 8, 16)]
    smooth = torch.stack([functional.interpolate(layer, size=side, mode="bicubic") for layer in layers]).mean(0)
    blocks = functional.interpolate(layers[1], size=side, mode="nearest")
    half = side // 2
    picture = torch.cat([smooth[..., :half], blocks[..., half:]], dim=-1)
    return (picture[0] * 2 - 1).clamp(-1, 1)


def _with_ones(cells: torch.Tensor) -> torch.Tensor:
    return torch.cat([cells, torch.ones_like(cells[:, :1])], dim=1)
