"""`python -m benchmarks`: runs the benchmarks one after the other, prints a table, writes JSON."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from benchmarks import (
    cache,
    compiled,
    demo,
    encode,
    engine,
    gateway,
    health,
    history,
    memory,
    mix,
    nodes,
    overhead,
    rewrite,
    vision,
)
from benchmarks.neighbours import Neighbours
from benchmarks.results import Figure, Findings, show, write
from benchmarks.setting import Setting
from services.gateway.settings import GatewaySettings
from shared.logs import configure_logs

BENCHMARKS: Mapping[str, Callable[[Setting], Findings]] = {
    module.NAME: module.run
    for module in (
        overhead,
        demo,
        engine,
        mix,
        compiled,
        health,
        gateway,
        encode,
        nodes,
        cache,
        rewrite,
        vision,
        history,
        memory,
    )
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures what the server costs.")
    parser.add_argument("--only", choices=sorted(BENCHMARKS), action="append", help="run this one; repeatable")
    parser.add_argument("--quick", action="store_true", help="few samples: shows that it works, not how fast")
    parser.add_argument(
        "--data-dir", type=Path, default=GatewaySettings().data_dir, help="where checkpoints and logs are kept"
    )
    parser.add_argument("--output", type=Path, help="where the JSON goes; default: <data-dir>/bench.json")
    arguments = parser.parse_args()
    configure_logs("benchmarks")
    data_dir: Path = arguments.data_dir.resolve()
    data_dir.mkdir(parents=True, exist_ok=True)
    output: Path = arguments.output or data_dir / "bench.json"
    findings = _run(arguments.only or list(BENCHMARKS), data_dir, output, quick=arguments.quick)
    show([figure for found in findings.values() for figure in found.figures])
    Console().print(f"written to {output}", soft_wrap=True, highlight=False)


def _run(names: list[str], data_dir: Path, output: Path, *, quick: bool) -> dict[str, Findings]:
    """What the benchmarks found, which `output` has after each of them: a run that is stopped keeps what it had."""
    console = Console()
    findings: dict[str, Findings] = {}
    with Setting(data_dir, quick=quick) as setting:
        for name in names:
            console.print(f"measuring {name} ...", style="dim")
            neighbours = Neighbours()
            found = BENCHMARKS[name](setting)
            noise = Figure(benchmark=name, what="cores kept busy by other programs", value=neighbours.cores())
            findings[name] = Findings([*found.figures, noise], found.samples)
            write(findings, output)
    return findings


if __name__ == "__main__":
    main()
