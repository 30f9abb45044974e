"""What every benchmark is given."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import Server


@dataclass(frozen=True, slots=True)
class Setting:
    """A server that runs `model`; with `quick` a benchmark takes few samples, to see that it works."""

    server: Server
    model: Path
    data_dir: Path
    quick: bool
