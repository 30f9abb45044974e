"""`python -m benchmarks.gpu`: Z-Image in its published size on one GPU, diffusers' pipeline against the engine with each
of its options, in one run.

`--device cpu --size small` plays the same on a CPU in a minute, to see that it works. What a machine lacks is told in
the table, as the service would tell it at its start; what there was no time for, too.
"""

import argparse
import asyncio
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_models import SIZES, Models, free, make_models, parameters_of, step_flops
from benchmarks.gpu_options import LORA, OPTIONS, Option, loader
from benchmarks.studio import Script, Studio, Wanted, engine_of, pixels_of
from services.diffusion.order import Limits
from services.diffusion.shapes import Shape
from shared.checkpoint import UnusableModel
from shared.errors import ServiceError
from shared.logs import configure_logs

BUDGET_S = 440.0
STEPS, WARM_UP_STEPS = 9, 2
SIDES = {"full": (512, 1024), "small": (64, 128)}
MATRIX, MATRIX_ROUNDS = {"full": 8192, "small": 512}, 20
BASELINE = "ZImagePipeline"
PERCENTILE = 99.9
TEXT_TOKENS = 32  # of every prompt, padded
ALONE_LIMITS = Limits(running=1, batch=1, batch_tokens=10**9, decode_pixels=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line of the table; `levels` is the difference to the pipeline's picture of the same seed."""

    option: str
    side: int
    batch: int
    seconds: float = 0.0
    share_of_peak: float = 0.0
    memory_gib: float = 0.0
    levels: float = 0.0
    remark: str = ""


@dataclass(slots=True)
class Run:
    """A run: what it measures with, what it found, and how long it may take."""

    models: Models
    sides: Sequence[int]
    peak_flops: float
    end: float
    batches: int
    pictures: dict[int, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    @property
    def left_s(self) -> float:
        """Seconds until the budget is spent."""
        return self.end - time.monotonic()

    def note(self, option: str, side: int, batch: int, seconds: float, picture: Any) -> None:
        """Writes a measurement down."""
        tokens = Shape(height=side, width=side, text_tokens=TEXT_TOKENS).tokens
        flops = step_flops(self.models.transformer, tokens) * STEPS * batch
        expected = self.pictures.setdefault(side, picture)
        self.results.append(
            Result(
                option=option,
                side=side,
                batch=batch,
                seconds=seconds / batch,
                share_of_peak=flops / seconds / self.peak_flops,
                memory_gib=_peak_memory(self.models.device) / 2**30,
                levels=float(np.percentile(np.abs(picture - expected), PERCENTILE)),
            )
        )

    def leave_out(self, option: str, why: str) -> None:
        """Writes down that there is nothing to write down."""
        self.results.append(Result(option=option, side=0, batch=0, remark=why))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measures Z-Image's published size.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="full", choices=sorted(SIZES))
    parser.add_argument("--only", action="append", choices=[option.name for option in OPTIONS], help="repeatable")
    parser.add_argument("--batches", type=int, default=8, help="the most pictures at a time")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds after which no further option begins")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    configure_logs("gpu")
    end = time.monotonic() + arguments.budget
    device = torch.device(arguments.device)
    models = make_models(SIZES[arguments.size], device)
    run = Run(models, SIDES[arguments.size], _peak_flops(device, MATRIX[arguments.size]), end, arguments.batches)
    facts = _facts(run)
    _measure_encoder(models, facts)
    _measure_pipeline(run)
    for option in OPTIONS:
        if arguments.only is None or option.name in arguments.only:
            asyncio.run(_measure_option(run, option))
    arguments.output.write_text(json.dumps({**facts, "results": [asdict(one) for one in run.results]}, indent=2) + "\n")
    print("\n".join(_table(facts, run.results)))


def _measure_pipeline(run: Run) -> None:
    script = Script(run.models.pipeline())
    for side in run.sides:
        script.draw_batch([_wanted(side, 0, steps=WARM_UP_STEPS)])
        for batch in (one for one in (1, 2, 4, 8) if one <= run.batches):
            several = [_wanted(side, seed) for seed in range(batch)]
            _begin(run.models.device)
            started = time.perf_counter()
            pictures = script.draw_batch(several)
            run.note(BASELINE, side, batch, time.perf_counter() - started, np.asarray(pictures[0]).astype(int))


async def _measure_option(run: Run, option: Option) -> None:
    """One engine with that option; it is told why where it cannot be measured."""
    if run.left_s <= 0:
        run.leave_out(option.name, "no time was left")
        return
    batches = [batch for batch in option.batches if batch <= run.batches]
    most = max(batches)
    limits = Limits(running=most, batch=most, batch_tokens=10**9, decode_pixels=1)
    try:
        model = loader(run.models, option)()
    except (UnusableModel, RuntimeError, ImportError) as error:  # what kernels and compilers raise is their own
        run.leave_out(option.name, str(error).splitlines()[0])
        return
    try:
        async with engine_of(lambda: model, ALONE_LIMITS if option.settings.get("cache_dit") else limits) as ours:
            for side in run.sides:
                await _measure_side(run, option, ours, side, batches)
    except ServiceError as error:
        run.leave_out(option.name, f"failed: {error.detail}")
    del model
    free(run.models.device)


async def _measure_side(run: Run, option: Option, ours: Studio, side: int, batches: Sequence[int]) -> None:
    lora = LORA if option.lora else None
    for batch in batches:
        await ours.draw_at_once([_wanted(side, seed, steps=WARM_UP_STEPS, lora=lora) for seed in range(batch)])
        several = [_wanted(side, seed, lora=lora) for seed in range(batch)]
        _begin(run.models.device)
        started = time.perf_counter()
        pictures = await asyncio.gather(*(ours.draw(wanted) for wanted in several))
        run.note(option.name, side, batch, time.perf_counter() - started, pixels_of(pictures[0]))


@torch.inference_mode()
def _measure_encoder(models: Models, facts: dict[str, Any]) -> None:
    """A prompt padded to 512 tokens, as the pipeline has it, and one of 32, as the service's encoder has it."""
    for tokens in (512, 32):
        ids = torch.zeros((1, tokens), dtype=torch.long, device=models.device)
        models.encoder(input_ids=ids)
        _begin(models.device)
        started = time.perf_counter()
        models.encoder(input_ids=ids)
        _synchronize(models.device)
        facts[f"encoding {tokens} tokens, s"] = round(time.perf_counter() - started, 5)


def _peak_flops(device: torch.device, side: int) -> float:
    """What the device makes of products of large bfloat16 matrices, operations a second."""
    one, other = (torch.randn((side, side), device=device).bfloat16() for _ in range(2))
    one @ other
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(MATRIX_ROUNDS):
        one @ other
    _synchronize(device)
    return 2.0 * side**3 * MATRIX_ROUNDS / (time.perf_counter() - started)


def _wanted(side: int, seed: int, *, steps: int = STEPS, lora: str | None = None) -> Wanted:
    return Wanted(seed=seed, width=side, height=side, steps=steps, lora=lora)


def _begin(device: torch.device) -> None:
    _synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def _facts(run: Run) -> dict[str, Any]:
    models, device = run.models, run.models.device
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "matrix products, TFLOP/s": round(run.peak_flops / 1e12, 2),
        "numbers of the DiT": parameters_of(models.transformer),
        "numbers of the encoder": parameters_of(models.encoder),
    }


def _table(facts: dict[str, Any], results: Sequence[Result]) -> Iterator[str]:
    """Markdown, for docs/performance.md."""
    yield ", ".join(f"{name}: {value}" for name, value in facts.items())
    yield ""
    yield "| | Size | At a time | s a picture | Times as fast | Share of peak | Memory, GiB | Difference, levels |"
    yield "|---|---|---|---|---|---|---|---|"
    baseline = {one.side: one.seconds for one in results if one.option == BASELINE and one.batch == 1}
    for one in results:
        if one.remark:
            yield f"| {one.option} | {one.remark} | | | | | | |"
            continue
        gain = baseline[one.side] / one.seconds
        yield (
            f"| {one.option} | {one.side}x{one.side} | {one.batch} | {one.seconds:.3f} | {gain:.2f} | "
            f"{one.share_of_peak:.2f} | {one.memory_gib:.1f} | {one.levels:.1f} |"
        )


if __name__ == "__main__":
    main()
