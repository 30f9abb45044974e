"""Which pictures are begun, and which of those in the making make the next step together. Knows no device.

Waiting pictures are begun by priority, then age. Pictures of one shape form a group; groups take turns, the one whose
turn is longest ago first, so that short pictures are not held up by long ones and none starves.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from services.diffusion.shapes import Shape
from shared.schemas.fields import Priority

_RANKS = {priority: rank for rank, priority in enumerate(Priority)}


class Picture(Protocol):
    """A picture as its place in the order depends on it."""

    @property
    def shape(self) -> Shape:
        """Of its next step."""

    @property
    def priority(self) -> Priority:
        """As it was asked for."""

    @property
    def number(self) -> int:
        """Lower is older."""

    @property
    def turn(self) -> int:
        """The tick of its last step, or of its beginning."""


P = TypeVar("P", bound=Picture)


@dataclass(frozen=True, slots=True)
class Limits:
    """How many pictures are in the making, how many, of how many tokens, share a step, and how many pixels are decoded
    at once."""

    running: int
    batch: int
    batch_tokens: int
    decode_pixels: int

    def batch_of(self, shape: Shape) -> int:
        """Pictures of that shape that share a step; one always may."""
        return max(1, min(self.batch, self.batch_tokens // shape.tokens))


def in_line(waiting: Iterable[P]) -> list[P]:
    """Waiting pictures in the order in which they are begun."""
    return sorted(waiting, key=lambda one: (_RANKS[one.priority], one.number))


def admissible(
    waiting: Iterable[P], running: Iterable[Picture], limits: Limits, fits: Callable[[Sequence[Shape]], bool]
) -> list[P]:
    """The waiting pictures that can be begun now; `fits` says whether pictures of these shapes can be in the making.

    One whose group is full is passed over, as its turn comes when the group's first is done. One that does not fit
    into memory holds up all behind it: if smaller ones went first it might wait forever.
    """
    shapes = [one.shape for one in running]
    chosen: list[P] = []
    for one in in_line(waiting):
        if len(shapes) >= limits.running:
            break
        if shapes.count(one.shape) >= limits.batch_of(one.shape):
            continue
        if not fits([*shapes, one.shape]):
            break
        shapes.append(one.shape)
        chosen.append(one)
    return chosen


def next_group(running: Iterable[P], limits: Limits) -> Sequence[P]:
    """The pictures that make the next step together; none when nothing is in the making."""
    groups: defaultdict[Shape, list[P]] = defaultdict(list)
    for one in running:
        groups[one.shape].append(one)
    if not groups:
        return []
    group = min(groups.values(), key=lambda members: min((one.turn, one.number) for one in members))
    group.sort(key=lambda one: (one.turn, one.number))
    return group[: limits.batch_of(group[0].shape)]


def decoded_together(finished: Iterable[P], limits: Limits) -> list[Sequence[P]]:
    """Finished pictures of one size in the parts in which they are decoded."""
    pictures = list(finished)
    if not pictures:
        return []
    count = max(1, limits.decode_pixels // pictures[0].shape.pixels)
    return [pictures[start : start + count] for start in range(0, len(pictures), count)]
