"""The engine against diffusers' pipeline: one client, eight clients, and what sharing steps changes in the pictures."""

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import Figure, Findings, median_ratio
from benchmarks.setting import Setting
from benchmarks.studio import Script, Studio, Wanted, pixels_of, studio
from services.diffusion.jobs import Picture
from services.diffusion.settings import DiffusionSettings
from shared.settings import BUNDLED_MODEL, Device

NAME = "engine"
CLIENTS = 8
PAIRS, QUICK_PAIRS = 32, 1
ROUNDS, QUICK_ROUNDS = {128: 7, 256: 5, 512: 3}, 1
ALONE_AIM, TOGETHER_AIMS, LEVELS_AIM = 1.03, {128: 2.0, 256: 1.5, 512: 0.97}, 2.0
PERCENTILE = 99.9


def run(setting: Setting) -> Findings:
    """Draws with the demo model, in bfloat16, on the CPU."""
    return asyncio.run(_run(BUNDLED_MODEL, quick=setting.quick))


async def _run(checkpoint: Path, *, quick: bool) -> Findings:
    script = Script.load(checkpoint)
    settings = DiffusionSettings(model_path=checkpoint, dit_device=Device.CPU, vae_device=Device.CPU)
    async with studio(settings) as ours:
        alone = await _alone(ours, script, QUICK_PAIRS if quick else PAIRS)
        together = {}
        for side in ROUNDS:
            together[side] = await _together(ours, script, side, QUICK_ROUNDS if quick else ROUNDS[side])
        levels = await _levels(ours)
    figures = [*_figures_alone(alone), *_figures_together(together), _figure_of_levels(levels)]
    return Findings(figures, {"alone": alone, "together": {str(side): rounds for side, rounds in together.items()}})


def _figures_alone(alone: list[dict[str, Any]]) -> list[Figure]:
    return [
        Figure(
            benchmark=NAME,
            what="one client, 256x256: engine / pipeline, embeddings to pixels",
            value=median_ratio([one["engine_s"] for one in alone], [one["pipeline_s"] for one in alone]),
            aim=ALONE_AIM,
        ),
        Figure(
            benchmark=NAME,
            what="one client: numbers that differ from the pipeline's",
            value=sum(one["different"] for one in alone),
            aim=0.0,
        ),
    ]


def _figures_together(together: dict[int, list[dict[str, float]]]) -> list[Figure]:
    figures = []
    for side, rounds in together.items():
        figures += [
            Figure(
                benchmark=NAME,
                what=f"{CLIENTS} clients, {side}x{side}: pictures a second / pipeline in sequence",
                value=statistics.median(one["pipeline_s"] / one["engine_s"] for one in rounds),
                aim=TOGETHER_AIMS[side],
                better="more",
            ),
            Figure(
                benchmark=NAME,
                what=f"{CLIENTS} clients, {side}x{side}",
                value=CLIENTS / statistics.median(one["engine_s"] for one in rounds),
                unit="/s",
            ),
        ]
    return figures


def _figure_of_levels(levels: float) -> Figure:
    return Figure(
        benchmark=NAME,
        what=f"{CLIENTS} prompts together against each alone, p{PERCENTILE:g}",
        value=levels,
        unit="levels",
        aim=LEVELS_AIM,
    )


async def _alone(ours: Studio, script: Script, pairs: int) -> list[dict[str, Any]]:
    """Each side first as often as second, after a picture that warms both up. What the engine takes is all but the
    PNG."""
    taken = []
    for number in range(pairs + 1):
        wanted = Wanted(seed=number)
        if number % 2:
            theirs, pipeline_s = _timed(script, wanted)
            picture, engine_s = await _timed_engine(ours, wanted)
        else:
            picture, engine_s = await _timed_engine(ours, wanted)
            theirs, pipeline_s = _timed(script, wanted)
        different = int((pixels_of(picture) != np.asarray(theirs)).sum())
        taken.append({"engine_s": engine_s, "pipeline_s": pipeline_s, "different": different})
    return taken[1:]


async def _together(ours: Studio, script: Script, side: int, rounds: int) -> list[dict[str, float]]:
    taken = []
    for number in range(rounds + 1):
        several = [Wanted(seed=100 * number + client, width=side, height=side) for client in range(CLIENTS)]
        if number % 2:
            pipeline_s = script.draw_pngs(several)
            engine_s = await ours.draw_at_once(several)
        else:
            engine_s = await ours.draw_at_once(several)
            pipeline_s = script.draw_pngs(several)
        taken.append({"engine_s": engine_s, "pipeline_s": pipeline_s})
    return taken[1:]


async def _levels(ours: Studio) -> float:
    """The grey levels that all but one number in a thousand differ by at most, of the picture that differs most."""
    several = [Wanted(seed=7_000 + client) for client in range(CLIENTS)]
    together = await asyncio.gather(*(ours.draw(wanted) for wanted in several))
    alone = [await ours.draw(wanted) for wanted in several]
    return max(
        float(np.percentile(np.abs(pixels_of(one) - pixels_of(other)), PERCENTILE))
        for one, other in zip(together, alone, strict=True)
    )


def _timed(script: Script, wanted: Wanted) -> tuple[Any, float]:
    started = time.perf_counter()
    picture = script.draw(wanted)
    return picture, time.perf_counter() - started


async def _timed_engine(ours: Studio, wanted: Wanted) -> tuple[Picture, float]:
    started = time.perf_counter()
    picture = await ours.draw(wanted)
    return picture, time.perf_counter() - started - picture.timings.png
