"""How many pictures a step takes, learnt from steps for which memory ran out."""

from services.diffusion.shapes import Shape

PROVEN_STEPS = 32  # of as many pictures as fit, after which one more is tried


class GroupSizes:
    """The most pictures of each shape that a step takes. No bound is known of a shape until a step of it fails."""

    def __init__(self) -> None:
        self._most: dict[Shape, int] = {}
        self._proven: dict[Shape, int] = {}  # steps of so many that went well

    def most(self, shape: Shape) -> int | None:
        """Pictures of this shape that a step may take, None where that is not bounded."""
        return self._most.get(shape)

    def note_failure(self, shape: Shape, pictures: int) -> None:
        """Memory ran out in a step of so many pictures, two or more: half of them may fit."""
        self._most[shape] = pictures // 2
        self._proven[shape] = 0

    def note_success(self, shape: Shape, pictures: int) -> None:
        """A step of so many went well: after many of as many as may be, one more is tried."""
        if pictures != self._most.get(shape):
            return
        self._proven[shape] += 1
        if self._proven[shape] >= PROVEN_STEPS:
            self._most[shape] += 1
            self._proven[shape] = 0

    def forget(self) -> None:
        """What fits has changed."""
        self._most.clear()
        self._proven.clear()
