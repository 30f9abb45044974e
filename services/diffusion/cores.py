"""The cores of a processor, each with a part of a group: quicker than all of them on one picture after the other.

One small picture leaves cores idle: its tensors are too small to be divided. Several pictures need not be divided.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Cores:
    """Threads for parts of a group. Used by the device's thread alone, which keeps all cores for single pictures."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="core") if count > 1 else None

    def each(self, work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
        """What `work` makes of the items, in their order: at once in as many parts as there are cores or items."""
        if self._threads is None or len(items) < 2:
            return list(work(items))
        parts = min(self._count, len(items))
        bounds = [len(items) * part // parts for part in range(parts + 1)]
        threads = self._count // parts

        def run(part: int) -> Sequence[R]:
            torch.set_num_threads(threads)  # of this thread alone
            with torch.inference_mode():
                return work(items[bounds[part] : bounds[part + 1]])

        running = [self._threads.submit(run, part) for part in range(parts)]
        wait(running)  # also when one fails: the others use the same memory
        torch.set_num_threads(self._count)  # threads that are yet to compute would begin with the parts' number
        return [one for part in running for one in part.result()]
