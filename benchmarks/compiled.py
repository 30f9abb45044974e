"""What `--compile` gains on the CPU over eager, and what it changes in the pictures."""

import asyncio
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.results import Figure, Findings, median_ratio
from benchmarks.setting import Setting
from benchmarks.studio import Studio, Wanted, pixels_of, studio
from services.diffusion.settings import DiffusionSettings
from shared.settings import BUNDLED_MODEL, Device

NAME = "compile"
SIDES = (256, 512)
PAIRS, QUICK_PAIRS = 7, 1


def run(setting: Setting) -> Findings:
    """Draws with the demo model, in bfloat16, in pairs of which each is first as often as second."""
    return asyncio.run(_run(BUNDLED_MODEL, QUICK_PAIRS if setting.quick else PAIRS))


async def _run(checkpoint: Path, pairs: int) -> Findings:
    settings = DiffusionSettings(model_path=checkpoint, dit_device=Device.CPU, vae_device=Device.CPU)
    started = time.perf_counter()
    async with studio(settings.model_copy(update={"compile": True})) as compiled:
        loading_s = time.perf_counter() - started
        async with studio(settings) as eager:
            taken = {side: await _pairs(compiled, eager, side, pairs) for side in SIDES}
    figures = []
    for side, seconds in taken.items():
        figures.append(
            Figure(
                benchmark=NAME,
                what=f"{side}x{side}: steps compiled / eager",
                value=median_ratio([one["compiled_s"] for one in seconds], [one["eager_s"] for one in seconds]),
            )
        )
    levels = statistics.median(one["levels"] for seconds in taken.values() for one in seconds)
    return Findings(
        [
            *figures,
            Figure(benchmark=NAME, what="difference to eager, p99.9", value=levels, unit="levels"),
            Figure(benchmark=NAME, what="loading with compilation", value=loading_s, unit="s"),
        ],
        {str(side): seconds for side, seconds in taken.items()},
    )


async def _pairs(compiled: Studio, eager: Studio, side: int, pairs: int) -> list[dict[str, float]]:
    taken = []
    for number in range(pairs + 1):
        wanted = Wanted(seed=number, width=side, height=side)
        order = (compiled, eager) if number % 2 else (eager, compiled)
        pictures = {id(one): await one.draw(wanted) for one in order}
        ours, theirs = pictures[id(compiled)], pictures[id(eager)]
        levels = np.percentile(np.abs(pixels_of(ours) - pixels_of(theirs)), 99.9)
        taken.append({"compiled_s": ours.timings.denoise, "eager_s": theirs.timings.denoise, "levels": float(levels)})
    return taken[1:]
