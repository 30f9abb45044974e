"""Short pictures beside long ones: what taking turns saves them against first in, first out, and what it costs all."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.results import Figure, Findings, median_ratio, percentile
from benchmarks.setting import Setting
from benchmarks.studio import Studio, Wanted, studio
from services.diffusion.order import Limits
from services.diffusion.settings import DiffusionSettings
from shared.settings import BUNDLED_MODEL, Device

NAME = "mix"
LONG_PX, LONG_STEPS = 512, 30
SHORT_PX, SHORT_STEPS = 256, 4
REQUESTS, QUICK_REQUESTS = 48, 8
AT_ONCE, QUICK_AT_ONCE = 16, 4
ROUNDS, QUICK_ROUNDS = 5, 1
LOAD = 0.8  # of what one after the other can do
WAIT_AIM, THROUGHPUT_AIM = 1 / 3, 0.97
FIRST_IN_FIRST_OUT = Limits(running=1, batch=1, batch_tokens=1, decode_pixels=1)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A picture that is asked for at this time."""

    at_s: float
    wanted: Wanted

    @property
    def short(self) -> bool:
        """Of the small size with few steps."""
        return self.wanted.steps == SHORT_STEPS


@dataclass(frozen=True, slots=True)
class Day:
    """How long the short pictures took, and all of them together."""

    short_s: Sequence[float]
    long_s: Sequence[float]
    whole_s: float


def run(setting: Setting) -> Findings:
    """Plays the same arrivals to the engine, and to one that makes one picture after the other.

    At 80 % of capacity both get all of them done, so what they can do in a second is measured with all at once, several
    times, each side first as often as second.
    """
    if setting.quick:
        return asyncio.run(_run(BUNDLED_MODEL, QUICK_REQUESTS, QUICK_AT_ONCE, QUICK_ROUNDS))
    return asyncio.run(_run(BUNDLED_MODEL, REQUESTS, AT_ONCE, ROUNDS))


async def _run(checkpoint: Path, requests: int, at_once: int, rounds: int) -> Findings:
    settings = DiffusionSettings(model_path=checkpoint, dit_device=Device.CPU, vae_device=Device.CPU)
    async with studio(settings, FIRST_IN_FIRST_OUT) as one_by_one, studio(settings) as in_turns:
        for either in (in_turns, one_by_one):
            await _service_s(either)  # warms it up
        arrivals = _arrivals(requests, await _service_s(one_by_one) / LOAD)
        queued, taking_turns = await _play(one_by_one, arrivals), await _play(in_turns, arrivals)
        full = [await _at_once(one_by_one, in_turns, at_once, number) for number in range(rounds)]
    samples = {"first_in_first_out": asdict(queued), "in_turns": asdict(taking_turns), "at_once_s": full}
    return Findings(_figures(queued, taking_turns, full), samples)


async def _at_once(one_by_one: Studio, in_turns: Studio, requests: int, number: int) -> tuple[float, float]:
    """Seconds that each takes for pictures that are all asked for at once."""
    arrivals = _arrivals(requests, None)
    if number % 2:
        return (await _play(one_by_one, arrivals)).whole_s, (await _play(in_turns, arrivals)).whole_s
    second = (await _play(in_turns, arrivals)).whole_s
    return (await _play(one_by_one, arrivals)).whole_s, second


def _figures(queued: Day, taking_turns: Day, full: Sequence[tuple[float, float]]) -> list[Figure]:
    return [
        Figure(
            benchmark=NAME,
            what="short pictures, p95: in turns / first in, first out",
            value=percentile(taking_turns.short_s, 0.95) / percentile(queued.short_s, 0.95),
            aim=WAIT_AIM,
        ),
        Figure(
            benchmark=NAME,
            what="pictures a second, all asked for at once: in turns / first in, first out",
            value=median_ratio(*zip(*full, strict=True)),
            aim=THROUGHPUT_AIM,
            better="more",
        ),
        Figure(
            benchmark=NAME,
            what="pictures a second of the arrivals: in turns / first in, first out",
            value=queued.whole_s / taking_turns.whole_s,
            aim=THROUGHPUT_AIM,
            better="more",
        ),
        Figure(
            benchmark=NAME, what="short pictures, p95, in turns", value=percentile(taking_turns.short_s, 0.95), unit="s"
        ),
        Figure(
            benchmark=NAME,
            what="long pictures, p95: in turns / first in, first out",
            value=percentile(taking_turns.long_s, 0.95) / percentile(queued.long_s, 0.95),
        ),
    ]


async def _service_s(one: Studio) -> float:
    """Seconds that a request takes on average when it is alone."""
    started = time.perf_counter()
    for wanted in (_long(0), _short(1)):
        await one.draw(wanted)
    return (time.perf_counter() - started) / 2


def _arrivals(requests: int, pause_s: float | None) -> list[Arrival]:
    """As many long as short ones in random order, at random times with that pause on average (Poisson), or at once."""
    source = random.Random(0)  # noqa: S311 - the same arrivals in every run
    short = [number % 2 == 0 for number in range(requests)]
    source.shuffle(short)
    arrivals, at_s = [], 0.0
    for number, is_short in enumerate(short):
        arrivals.append(Arrival(at_s, _short(number) if is_short else _long(number)))
        at_s += source.expovariate(1 / pause_s) if pause_s else 0.0
    return arrivals


async def _play(one: Studio, arrivals: Sequence[Arrival]) -> Day:
    started = time.perf_counter()

    async def arrive(arrival: Arrival) -> float:
        await asyncio.sleep(max(0.0, started + arrival.at_s - time.perf_counter()))
        await one.draw(arrival.wanted)
        return time.perf_counter() - started - arrival.at_s

    taken = await asyncio.gather(*map(arrive, arrivals))
    whole_s = time.perf_counter() - started
    return Day(
        [seconds for seconds, arrival in zip(taken, arrivals, strict=True) if arrival.short],
        [seconds for seconds, arrival in zip(taken, arrivals, strict=True) if not arrival.short],
        whole_s,
    )


def _long(seed: int) -> Wanted:
    return Wanted(seed=seed, width=LONG_PX, height=LONG_PX, steps=LONG_STEPS)


def _short(seed: int) -> Wanted:
    return Wanted(seed=seed, width=SHORT_PX, height=SHORT_PX, steps=SHORT_STEPS)
