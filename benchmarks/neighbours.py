"""How much of the machine other programs used meanwhile: figures taken beside busy neighbours mean little."""

import time
from contextlib import suppress

import psutil  # type: ignore[import-untyped]


class Neighbours:
    """Counts processor time from its making on: all of it, and that of this process and what it started."""

    def __init__(self) -> None:
        self._started, self._all, self._own = time.monotonic(), _machine(), _own()

    def cores(self) -> float:
        """Cores that others kept busy on average."""
        elapsed = time.monotonic() - self._started
        others = (_machine() - self._all) - (_own() - self._own)
        return max(0.0, others / elapsed)


def _machine() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _own() -> float:
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])  # user, system, and both of the children that have ended
    return total
