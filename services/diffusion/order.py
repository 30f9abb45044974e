"""Which pictures are begun, and which of those in the making make the next step together. Knows no device.

Waiting pictures are begun by priority, then age. Pictures of one shape form a group; groups take turns, the one whose
turn is longest ago first, so that short pictures are not held up by long ones and none starves. A full group takes in
what would be done well before it, or is more urgent: its pictures then take turns.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from services.diffusion.shapes import Shape
from shared.schemas.fields import Priority

SHORT = 0.5  # of the steps that a group has left: a picture of so few joins it also where it is full
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
    def steps_left(self) -> int:
        """Steps that are still to be done."""

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

    One whose group is full is passed over, as its turn comes when the group's first has made its steps. One that does
    not fit into memory holds up all behind it: if smaller ones went first it might wait forever.
    """
    begun: list[Picture] = list(running)
    chosen: list[P] = []
    for one in in_line(waiting):
        if len(begun) >= limits.running:
            break
        if not _may_join(one, [other for other in begun if other.steps_left and other.shape == one.shape], limits):
            continue
        if not fits([*(other.shape for other in begun), one.shape]):
            break
        begun.append(one)
        chosen.append(one)
    return chosen


def _may_join(one: Picture, group: Sequence[Picture], limits: Limits) -> bool:
    """Whether a picture may be in the making beside those of its shape."""
    most = limits.batch_of(one.shape)
    if len(group) < most:
        return True
    behind = [
        other
        for other in group
        if _RANKS[one.priority] < _RANKS[other.priority] or one.steps_left <= SHORT * other.steps_left
    ]
    return len(group) < 2 * most and len(behind) >= most


def next_group(running: Iterable[P], limits: Limits) -> Sequence[P]:
    """The pictures that make the next step together; none when none has a step to make."""
    groups: defaultdict[Shape, list[P]] = defaultdict(list)
    for one in running:
        if one.steps_left:
            groups[one.shape].append(one)
    if not groups:
        return []
    group = min(groups.values(), key=lambda members: min((one.turn, one.number) for one in members))
    group.sort(key=lambda one: (one.turn, one.number))
    return group[: limits.batch_of(group[0].shape)]


def next_decoded(running: Iterable[P], limits: Limits) -> Sequence[P]:
    """The pictures without a step to make that are decoded together next: the oldest one, and others of its size."""
    finished = sorted((one for one in running if not one.steps_left), key=lambda one: one.number)
    if not finished:
        return []
    size = (finished[0].shape.width, finished[0].shape.height)
    alike = [one for one in finished if (one.shape.width, one.shape.height) == size]
    return alike[: max(1, limits.decode_pixels // finished[0].shape.pixels)]
