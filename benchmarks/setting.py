"""What every benchmark is given."""

from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.processes import Server, serve
from zimage.checkpoints import Size, make_checkpoint, make_vision_checkpoint


class Setting:
    """The data folder, and a server on a random model of moderate size that starts when it is first asked for.

    With `quick` a benchmark takes few samples, to see that it works.
    """

    def __init__(self, data_dir: Path, *, quick: bool) -> None:
        self.data_dir = data_dir
        self.quick = quick
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @cached_property
    def model(self) -> Path:
        """The model of moderate size."""
        return make_checkpoint(self.data_dir / "checkpoints" / "bench", size=Size.BENCH, dtype="bfloat16")

    @cached_property
    def vision_model(self) -> Path:
        """The Qwen3-VL model that goes with it."""
        folder = self.data_dir / "checkpoints" / "bench-vl"
        return make_vision_checkpoint(folder, size=Size.BENCH, dtype="bfloat16")

    @cached_property
    def server(self) -> Server:
        """`zimage serve` on it, ready."""
        return self._stack.enter_context(serve(self.model, self.data_dir))
