"""A run of `benchmarks.gpu`: its models, its time, its report; and what tells time and memory on a device."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog
import torch

from benchmarks.gpu_models import Models, step_operations
from benchmarks.gpu_report import Report, Row
from services.diffusion.shapes import Shape
from shared.checkpoint import UnusableModel

STEPS, TEXT_TOKENS = 9, 32
MATRIX_ROUNDS = 20
PERCENTILE, GIB = 99.9, 2**30
NO_TIME = "the time was up"

log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class Run:
    """A run: what it measures with, what it found, and until when, by `time.monotonic`, it may begin anything more."""

    models: Models
    sides: Sequence[int]
    most: int
    end: float
    peak_operations: float
    report: Report
    beside_bytes: int = 0  # on the device, and no part of what is measured
    pictures: dict[int, Any] = field(default_factory=dict)  # the pipeline's, of the first seed, by side

    @property
    def left_s(self) -> float:
        """Seconds until the budget is spent."""
        return self.end - time.monotonic()

    def cells(self, batches: Sequence[int]) -> list[tuple[int, int]]:
        """Sides and batches to measure."""
        return [(side, batch) for batch in batches if batch <= self.most for side in self.sides]

    def note(self, option: str, side: int, batch: int, seconds: float, picture: Any) -> None:
        """Writes a measurement of so many pictures down; `picture` is the first of them, whole numbers."""
        tokens = Shape(height=side, width=side, text_tokens=TEXT_TOKENS).tokens
        operations = step_operations(self.models.transformer, tokens) * STEPS * batch
        difference = np.abs(picture - self.pictures.setdefault(side, picture))
        self.report.add(
            Row(
                option=option,
                side=side,
                batch=batch,
                seconds_a_picture=seconds / batch,
                share_of_peak=operations / seconds / self.peak_operations,
                memory_gib=max(0, peak_bytes(self.models.device) - self.beside_bytes) / GIB,
                mean_levels=float(difference.mean()),
                most_levels=float(np.percentile(difference, PERCENTILE)),
            )
        )


@contextmanager
def told(run: Run, what: str) -> Iterator[None]:
    """What fails within is written down instead of ending the run."""
    try:
        yield
    except UnusableModel as error:
        run.report.leave_out(what, str(error))
    except Exception as error:  # kernels and compilers raise errors of their own
        log.warning("could not be measured", what=what, exc_info=error)
        run.report.leave_out(what, (str(error).strip() or type(error).__name__).splitlines()[0])


def peak_operations(device: torch.device, side: int) -> float:
    """What the device makes of products of large bfloat16 matrices, operations a second."""
    one, other = (torch.randn((side, side), device=device).bfloat16() for _ in range(2))

    def multiply() -> None:
        for _ in range(MATRIX_ROUNDS):
            one @ other

    multiply()
    return 2.0 * side**3 * MATRIX_ROUNDS / seconds_of(device, multiply)


def seconds_of(device: torch.device, work: Callable[[], object]) -> float:
    """What the work takes until the device has done it."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def forget(device: torch.device) -> None:
    """Has the measuring of time and memory begin anew."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def synchronize(device: torch.device) -> None:
    """Waits for what the device still does."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def allocated_bytes(device: torch.device) -> int:
    """What tensors take on the device; 0 where torch does not count it."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def peak_bytes(device: torch.device) -> int:
    """The most that tensors took since `forget`; 0 where torch does not count it."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def free(device: torch.device) -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
