"""How long requests of a kind take, and from that: when one has been waited for so long that another node is asked."""

from collections import deque

SAMPLES, ENOUGH = 128, 16
LATE_FACTOR = 2.0  # of what all but one in ten stay within
LEAST_S = 0.05
MOST_SHARE = 0.1  # of the last requests may be asked for twice: more would be load instead of help


class Pace:
    """The last requests of one kind."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=SAMPLES)
        self._doubled: deque[bool] = deque(maxlen=SAMPLES)

    def patience_s(self) -> float | None:
        """How long to wait before another node is asked too; None to wait for as long as it takes."""
        if len(self._seconds) < ENOUGH or sum(self._doubled) > MOST_SHARE * SAMPLES:
            return None
        ordered = sorted(self._seconds)
        return max(LEAST_S, LATE_FACTOR * ordered[len(ordered) * 9 // 10])

    def note(self, seconds: float, *, doubled: bool) -> None:
        """A request was answered."""
        self._seconds.append(seconds)
        self._doubled.append(doubled)
