"""The first step of Qwen3-VL's vision tower on a CPU: patches to vectors, many to a convolution.

transformers gives every patch a convolution of its own, with one place to put the kernel, which a CPU does slowly. Side
by side as one long picture the same kernel goes over the same numbers in the same order, several times faster.
"""

from typing import Any

import torch
from torch import nn

ROW = 32  # patches side by side
FEWEST = 8 * ROW  # with fewer there is nothing to gain, and libraries choose other arithmetic
NARROWEST = 64  # likewise


class PatchesInRows(nn.Module):
    """In place of transformers' `Qwen3VLVisionPatchEmbed`, whose weights it shares: patches [patches, numbers] of any
    float to [patches, width] in the weights' dtype."""

    def __init__(self, embed: Any) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """What the module in whose place it is would give."""
        if len(patches) < FEWEST:
            embedded: torch.Tensor = self.embed(patches)
            return embedded
        return embed_rows(patches, self.embed.proj)


def in_rows(embed: Any) -> Any:
    """`PatchesInRows` around a `Qwen3VLVisionPatchEmbed` where that gives bit for bit the same, which is tried on this
    machine with `FEWEST` patches; else, and on other devices than a CPU, `embed` itself."""
    weight = embed.proj.weight
    if weight.device.type != "cpu" or len(weight) < NARROWEST:
        return embed
    numbers = weight[0].numel() * torch.arange(FEWEST).unsqueeze(1) + torch.arange(weight[0].numel())
    patches = torch.sin(numbers.double()).to(weight.dtype)
    return PatchesInRows(embed) if torch.equal(embed(patches), embed_rows(patches, embed.proj)) else embed


def embed_rows(patches: torch.Tensor, proj: nn.Conv3d) -> torch.Tensor:
    """Patches [patches, channels x time x rows x columns] of any float to [patches, width] in the dtype of `proj`,
    whose kernel is as large as a patch, by convolutions over `ROW` patches each; zeros fill the last row."""
    channels, *kernel = proj.weight.shape[1:]
    time, height, width = kernel
    count = len(patches)
    filled = nn.functional.pad(patches.to(proj.weight.dtype), (0, 0, 0, -count % ROW))
    rows = filled.view(-1, ROW, channels, time, height, width).permute(0, 2, 3, 4, 1, 5)
    embedded: torch.Tensor = proj(rows.reshape(-1, channels, time, height, ROW * width))
    return embedded.flatten(2).transpose(1, 2).reshape(-1, len(proj.weight))[:count]
