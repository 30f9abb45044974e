"""A picture in the making: what it is made of between two steps. Knows no model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from services.diffusion.shapes import Lora, Shape, shape_of
from shared.schemas.diffusion import DiffusionParameters


@dataclass(slots=True, eq=False, weakref_slot=True, kw_only=True)
class Denoising:
    """A picture in the making. `latents` and `velocity`, the last step's, are float32 [channels, height, width]; the
    embeddings are [tokens, width] in the DiT's dtype; `step` counts the steps that are done, of which `guided` says
    whether each has guidance."""

    parameters: DiffusionParameters
    latents: torch.Tensor
    text: torch.Tensor
    negative: torch.Tensor | None
    scheduler: Any
    guided: Sequence[bool]
    loras: tuple[Lora, ...] = ()
    velocity: torch.Tensor | None = None
    step: int = field(default=0)

    @property
    def finished(self) -> bool:
        """All steps are done."""
        return self.step >= self.parameters.steps

    @property
    def guides(self) -> bool:
        """The next step has guidance, which takes two forwards' worth of work."""
        return self.negative is not None and not self.finished and self.guided[self.step]

    @property
    def shape(self) -> Shape:
        """Of the next step."""
        negative = len(self.negative) if self.negative is not None and self.guides else None
        return shape_of(self.parameters, text=len(self.text), negative=negative, loras=self.loras)
