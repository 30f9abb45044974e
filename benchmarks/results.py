"""What a benchmark found, as a table for the eye and as JSON for a program."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number; where it has an aim, `met` says whether it reached it."""

    benchmark: str
    what: str
    value: float
    unit: str = ""
    aim: float | None = None
    better: Literal["less", "more"] = "less"

    @property
    def met(self) -> bool | None:
        """Whether the aim is reached, None without one."""
        if self.aim is None:
            return None
        return self.value <= self.aim if self.better == "less" else self.value >= self.aim


@dataclass(frozen=True, slots=True)
class Findings:
    """The figures of a benchmark and what they were made of."""

    figures: Sequence[Figure]
    samples: Mapping[str, Any] = field(default_factory=dict)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the pairs of ours / theirs: what slows both of a pair does not move it."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def show(figures: Sequence[Figure]) -> None:
    """Prints the table."""
    table = Table("benchmark", "what", "value", "aim", "")
    table.columns[2].justify = table.columns[3].justify = "right"
    for figure in figures:
        sign = "≤" if figure.better == "less" else "≥"
        aim = "" if figure.aim is None else f"{sign} {figure.aim:g} {figure.unit}".rstrip()
        verdict = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[figure.met]
        table.add_row(figure.benchmark, figure.what, f"{figure.value:.3f} {figure.unit}".rstrip(), aim, verdict)
    Console().print(table)


def write(findings: Mapping[str, Findings], path: Path) -> None:
    """Writes everything as JSON."""
    document = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()},
        "figures": [{**asdict(figure), "met": figure.met} for found in findings.values() for figure in found.figures],
        "samples": {name: found.samples for name, found in findings.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
