"""What decides whether pictures can share a forward of the DiT, and how large it then is. Knows no tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shared.schemas.diffusion import DiffusionParameters
from shared.schemas.fields import SIDE_MULTIPLE_PX

SEQUENCE_MULTIPLE = 32  # diffusers' SEQ_MULTI_OF: caption and picture are each padded to a multiple of it


@dataclass(frozen=True, slots=True, kw_only=True)
class ShelfLora:
    """A LoRA's file as it was when it was looked at; `stamp`, when it was written and its bytes, changes with the file,
    and makes of it another LoRA; `numbers` are those of its matrices."""

    name: str
    path: Path
    stamp: tuple[int, int]
    bytes: int
    numbers: int
    rank: int | None
    metadata: Mapping[str, str] = field(default_factory=dict, compare=False)


Lora = tuple[ShelfLora, float]
"""What is added to the weights, and its scale."""


def padded(tokens: int) -> int:
    """The length of a sequence once it is padded."""
    return -(-tokens // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Pictures of equal shape share forwards without masks between them. Sides are in pixels, texts in padded tokens;
    `negative_tokens` is 0 where the next step has no guidance."""

    height: int
    width: int
    text_tokens: int
    negative_tokens: int = 0
    loras: tuple[Lora, ...] = field(default=())

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height

    @property
    def tokens(self) -> int:
        """Tokens that one picture adds to a forward: with guidance it has two items, both as long as the longer."""
        picture = padded((self.height // SIDE_MULTIPLE_PX) * (self.width // SIDE_MULTIPLE_PX))
        items = 2 if self.negative_tokens else 1
        return items * (picture + max(self.text_tokens, self.negative_tokens))


def shape_of(parameters: DiffusionParameters, *, text: int, negative: int | None, loras: tuple[Lora, ...]) -> Shape:
    """The shape of a picture whose texts have so many tokens, `negative` None without guidance."""
    return Shape(
        height=parameters.height,
        width=parameters.width,
        text_tokens=padded(text),
        negative_tokens=0 if negative is None else padded(negative),
        loras=loras,
    )
