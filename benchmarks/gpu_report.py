"""What `benchmarks.gpu` found: written down after each measurement, as JSON and as a table in Markdown."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BASELINE = "ZImagePipeline"
COLUMNS = (
    "| Option | Size | At a time | s a picture | Times as fast | Share of peak | Memory, GiB | "
    "Difference, mean / p99.9 |"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Pictures of one size, so many at a time. `mean_levels` and `most_levels` (of 99.9 % of the numbers) are the
    difference to the pipeline's picture of the same seed, of 256 levels; memory is the most that tensors took."""

    option: str
    side: int
    batch: int
    seconds_a_picture: float
    share_of_peak: float
    memory_gib: float
    mean_levels: float
    most_levels: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """One text of so many tokens through the text encoder; `cosine` compares its states with those of the weights as
    they are, in the mean over tokens."""

    option: str
    tokens: int
    seconds: float
    memory_gib: float
    cosine: float


@dataclass(slots=True)
class Report:
    """Everything found so far, and the files that hold it: `path` and the same with the suffix `.md`."""

    path: Path
    facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    encodings: list[Encoding] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, found: Row | Encoding) -> None:
        """Writes a measurement down."""
        if isinstance(found, Row):
            self.rows.append(found)
        else:
            self.encodings.append(found)
        self.write()

    def leave_out(self, what: str, why: str) -> None:
        """Writes down that there is nothing to write down."""
        self.left_out[what] = why
        self.write()

    def write(self) -> None:
        """Writes both files anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(asdict(self), indent=2, default=str) + "\n")
        self.path.with_suffix(".md").write_text("\n".join(self.markdown()) + "\n")

    def markdown(self) -> Iterator[str]:
        """The tables."""
        yield ", ".join(f"{name} {value}" for name, value in self.facts.items())
        yield from ("", COLUMNS, "|---|---|---|---|---|---|---|---|")
        alone = {row.side: row.seconds_a_picture for row in self.rows if row.option == BASELINE and row.batch == 1}
        for row in self.rows:
            gain = f"{alone[row.side] / row.seconds_a_picture:.2f}" if row.side in alone else ""
            yield (
                f"| {row.option} | {row.side}x{row.side} | {row.batch} | {row.seconds_a_picture:.3f} | {gain} | "
                f"{row.share_of_peak:.2f} | {row.memory_gib:.1f} | {row.mean_levels:.2f} / {row.most_levels:.0f} |"
            )
        if self.encodings:
            yield from ("", "| Text encoder | Tokens | s | Memory, GiB | Cosine |", "|---|---|---|---|---|")
        for one in self.encodings:
            yield f"| {one.option} | {one.tokens} | {one.seconds:.4f} | {one.memory_gib:.1f} | {one.cosine:.5f} |"
        if self.left_out:
            yield from ("", "Not measured:", "")
        for what, why in self.left_out.items():
            yield f"- {what}: {why}"
