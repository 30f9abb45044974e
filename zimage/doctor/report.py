"""Looks at everything and tells it, as a table or as JSON."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from types import ModuleType

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shared.checkpoint import UnusableModel
from shared.settings import Device, Quantization
from zimage.doctor import accelerators, machine
from zimage.doctor.configuration import Configuration, read_configuration
from zimage.doctor.libraries import REINSTALL, library_row, package_row, try_import
from zimage.doctor.model import lora_rows, model_rows
from zimage.doctor.options import calibrate, calibration_row, option_rows
from zimage.doctor.row import Row, State, missing
from zimage.doctor.vision import vision_rows

_STYLES = {State.OK: "green", State.NOTE: "yellow", State.MISSING: "bold red"}


def examine_machine(*, as_json: bool, calibrating: bool = False) -> bool:
    """Prints what there is and what is missing, and answers whether the configured server could start.

    With `calibrating` it is measured how much memory pictures take, which loads the model.
    """
    with Console(stderr=True).status("Looking at this machine"):
        rows = list(look_at_everything(calibrating=calibrating))
    reasons = [row for row in rows if row.state is State.MISSING]
    if as_json:
        report = {"can_start": not reasons, "reasons": [_reason(row) for row in reasons], "rows": [*map(asdict, rows)]}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        _print(rows, reasons)
    return not reasons


def look_at_everything(*, calibrating: bool = False) -> Iterator[Row]:
    """Every finding; with `calibrating` also what is measured now."""
    configured, configuration = read_configuration()
    torch = try_import("torch")
    tensors = _module(try_import("shared.tensors"))
    device = _drawing_device(configuration, tensors)
    yield from (machine.python_row(), machine.platform_row(), machine.cpu_row(), machine.memory_row(tensors))
    yield from _torch_rows(torch, device)
    yield from _library_rows(configuration)
    diffusion = configuration.diffusion if configuration is not None and configuration.runs_diffusion else None
    encodes = configuration is not None and configuration.runs_encoder
    of_encoder = configuration.encoder.text_encoder_quantization if configuration and encodes else Quantization.NONE
    yield from option_rows(diffusion, torch, device, encoder=of_encoder)
    yield configured
    if configuration is not None:
        yield from _configured_rows(configuration, tensors)
    if diffusion is not None:
        yield from calibrate(diffusion) if calibrating else [calibration_row(diffusion)]


def _torch_rows(torch: ModuleType | str, device: str) -> Iterator[Row]:
    if isinstance(torch, str):
        yield missing("torch", f"cannot be imported: {torch}", REINSTALL)
        return
    yield accelerators.torch_row(torch)
    yield from accelerators.cuda_rows(torch)
    yield accelerators.mps_row(torch)
    yield accelerators.bf16_row(torch, device)


def _library_rows(configuration: Configuration | None) -> Iterator[Row]:
    draws = configuration is None or configuration.runs_diffusion
    yield library_row("numpy", "ndarray", needed=True)
    yield library_row("transformers", "Qwen3Model", needed=configuration is None or configuration.runs_encoder)
    yield library_row("diffusers", "ZImageTransformer2DModel", needed=draws)
    yield package_row("accelerate", "loads weights without a second copy", needed=False)


def _configured_rows(configuration: Configuration, tensors: ModuleType | None) -> Iterator[Row]:
    yield from machine.data_dir_rows(configuration.gateway.data_dir)
    yield machine.port_row(configuration.gateway)
    yield machine.redis_row(configuration.gateway)
    yield from model_rows(configuration, tensors)
    yield from lora_rows(configuration)
    yield from vision_rows(configuration, tensors)


def _drawing_device(configuration: Configuration | None, tensors: ModuleType | None) -> str:
    """Where the DiT is to run; a device that is not there is told in the model's rows."""
    wanted = Device.AUTO if configuration is None else configuration.diffusion.dit_device
    if tensors is not None:
        with suppress(UnusableModel):
            return str(tensors.pick_device(wanted).type)
    return Device.CPU.value


def _module(imported: ModuleType | str) -> ModuleType | None:
    return None if isinstance(imported, str) else imported


def _print(rows: Sequence[Row], reasons: Sequence[Row]) -> None:
    console = Console()
    table = Table("what", "state")
    table.add_column("detail", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for row in rows:
        state = f"[{_STYLES[row.state]}]{row.state}[/]"
        table.add_row(escape(row.what), state, escape(row.detail), escape(row.todo))
    console.print(table)
    if not reasons:
        console.print("[bold green]zimage serve can start here[/] with this configuration.")
        return
    console.print("[bold red]zimage serve cannot start here[/] with this configuration:")
    for row in reasons:
        console.print(f"- {_reason(row)}", markup=False, highlight=False, soft_wrap=True)


def _reason(row: Row) -> str:
    return f"{row.what}: {row.detail}" + (f" ({row.todo})" if row.todo else "")
