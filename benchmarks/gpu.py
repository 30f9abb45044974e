"""`python -m benchmarks.gpu`: Z-Image in its published size on one GPU, diffusers' pipeline against the engine with
each of its options, in one run.

`--tiny --device cpu` plays the same on a CPU in a minute, to see that it works. What a machine lacks is told as the
service would tell it at its start, and so is what there was no time for.
"""

import argparse
import asyncio
import io
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from benchmarks.baseline import PNG_LEVEL
from benchmarks.gpu_encoder import measure_encoder
from benchmarks.gpu_models import PUBLISHED, TINY, Size, make_models, numbers_of
from benchmarks.gpu_options import ALL, LORA, OPTIONS, Option, built
from benchmarks.gpu_report import BASELINE, Report
from benchmarks.gpu_run import NO_TIME, STEPS, Run, allocated_bytes, forget, free, peak_operations, told
from benchmarks.studio import Script, Studio, Wanted, engine_of, pixels_of
from services.diffusion.model import ZImageModel
from services.diffusion.order import Limits
from services.diffusion.settings import DiffusionSettings
from shared.errors import ServiceError
from shared.logs import configure_logs

BUDGET_S = 390.0
COMPILING_S = 60.0  # what compiles is not begun with less time left
ENCODER_S = 30.0  # of them are kept for the text encoder
WARM_UP_STEPS = 2
COMPILING, SLACK = 6, 2
"""Compiling takes about as long as so many measurements; an option may take so many times its share of the time."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measures Z-Image's published size.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that it works, not how fast")
    parser.add_argument("--only", action="append", choices=[option.name for option in OPTIONS], help="repeatable")
    parser.add_argument("--most", type=int, default=8, help="the most pictures at a time")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds after which nothing more begins")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="the tables go beside it, as .md")
    given = parser.parse_args(arguments)
    configure_logs("gpu")
    end = time.monotonic() + given.budget
    run = _begin(TINY if given.tiny else PUBLISHED, torch.device(given.device), end, given.most, given.output)
    _measure_pipeline(run)
    run.end = end - ENCODER_S
    wanted = [option for option in OPTIONS if given.only is None or option.name in given.only]
    for index, option in enumerate(wanted):
        share = _weight(run, option) / sum(_weight(run, other) for other in wanted[index:])
        _measure_option(run, option, time.monotonic() + SLACK * share * run.left_s)
    run.end = end
    measure_encoder(run)  # last: torchao changes the compiler's settings for all that comes after it
    print("\n".join(run.report.markdown()))


def _begin(size: Size, device: torch.device, end: float, most: int, output: Path) -> Run:
    """Makes the models, and measures what the device can do at most."""
    models = make_models(size, device)
    peak = peak_operations(device, size.matrix)
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "matrix peak, TFLOP/s": round(peak / 1e12, 3),
        "numbers of the DiT": numbers_of(models.transformer),
        "of the VAE": numbers_of(models.vae),
        "of the text encoder": numbers_of(models.encoder),
        "steps": STEPS,
    }
    report = Report(output, facts)
    report.write()
    return Run(models=models, sides=size.sides, most=most, end=end, peak_operations=peak, report=report)


def _measure_pipeline(run: Run) -> None:
    script = Script(run.models.pipeline())
    run.beside_bytes = sum(weight.nbytes for weight in run.models.encoder.parameters())
    for side, batch in run.cells(ALL):
        if run.left_s <= 0:
            run.report.leave_out(f"{BASELINE}, {side}x{side}, {batch} at a time", NO_TIME)
            continue
        with told(run, f"{BASELINE}, {side}x{side}, {batch} at a time"):
            _measure_pipeline_cell(run, script, side, batch)
        free(run.models.device)


def _measure_pipeline_cell(run: Run, script: Script, side: int, batch: int) -> None:
    _draw(script, [_wanted(side, seed, steps=WARM_UP_STEPS) for seed in range(batch)])
    forget(run.models.device)
    started = time.perf_counter()
    pictures = _draw(script, [_wanted(side, seed) for seed in range(batch)])
    run.note(BASELINE, side, batch, time.perf_counter() - started, np.asarray(pictures[0]).astype(int))


def _draw(script: Script, several: Sequence[Wanted]) -> Sequence[Any]:
    """Pictures and their PNGs, as the engine makes them, too."""
    pictures = script.draw_batch(several)
    for picture in pictures:
        picture.save(io.BytesIO(), "PNG", compress_level=PNG_LEVEL)
    return pictures


def _measure_option(run: Run, option: Option, end: float) -> None:
    """One engine with that option; it is told why where it cannot be measured."""
    if run.left_s <= (COMPILING_S if option.compiles else 0):
        run.report.leave_out(option.name, NO_TIME)
        return
    run.beside_bytes = allocated_bytes(run.models.device)
    with told(run, option.name):
        _try_option(run, option, min(end, run.end))
    torch.compiler.reset()  # copies of one model count as variants of one code, of which a few are compiled
    free(run.models.device)


def _try_option(run: Run, option: Option, end: float) -> None:
    """A function of its own: nothing holds the model any more when what it took is given back."""
    with built(run.models, option, max(run.sides)) as model:
        asyncio.run(_measure_model(run, option, model, end))


async def _measure_model(run: Run, option: Option, model: ZImageModel, end: float) -> None:
    cells = run.cells(option.batches)
    most = 1 if option.settings.get("cache_dit") else max((batch for _, batch in cells), default=1)
    decode_pixels = DiffusionSettings.model_fields["vae_batch_pixels"].default
    async with engine_of(lambda: model, Limits(most, most, batch_tokens=10**9, decode_pixels=decode_pixels)) as ours:
        for index, (side, batch) in enumerate(cells):
            if index and time.monotonic() > end:
                run.report.leave_out(f"{option.name}, {side}x{side}, {batch} at a time", NO_TIME)
                continue
            try:
                await _measure_cell(run, option, ours, side, batch)
            except* ServiceError as errors:
                told_first = str(errors.exceptions[0])
                run.report.leave_out(f"{option.name}, {side}x{side}, {batch} at a time", told_first)


async def _measure_cell(run: Run, option: Option, ours: Studio, side: int, batch: int) -> None:
    lora = LORA if option.lora else None
    await ours.draw_at_once([_wanted(side, seed, steps=WARM_UP_STEPS, lora=lora) for seed in range(batch)])
    forget(run.models.device)
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:  # one that fails ends the others: the next cell is measured alone
        drawn = [group.create_task(ours.draw(_wanted(side, seed, lora=lora))) for seed in range(batch)]
    run.note(option.name, side, batch, time.perf_counter() - started, pixels_of(drawn[0].result()))


def _weight(run: Run, option: Option) -> int:
    """About how long an option takes compared with others."""
    return len(run.cells(option.batches)) + COMPILING * bool(option.settings.get("compile"))


def _wanted(side: int, seed: int, *, steps: int = STEPS, lora: str | None = None) -> Wanted:
    return Wanted(seed=seed, width=side, height=side, steps=steps, lora=lora)


if __name__ == "__main__":
    main()
