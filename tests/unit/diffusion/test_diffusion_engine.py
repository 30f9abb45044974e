"""`DiffusionEngine` on the tiny checkpoint: the queue's bound, groups, news, cancelling, deadlines and the end."""

import asyncio
import io
import threading
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import structlog
from engines import LIMITS, MAX_WAITING, ONE_BY_ONE, draw, drawn_by, hold, pixels_of, queue, request, running
from fakes import PATIENCE_S, WatchedModel, embeddings, parameters
from inprocess import eventually
from PIL import Image

from services.diffusion.engine import DiffusionEngine, PreviewReady
from services.diffusion.jobs import Picture, StepDone, Waits
from services.diffusion.model import ZImageModel
from services.diffusion.order import Limits
from shared.errors import (
    Cancelled,
    InvalidField,
    NotBegun,
    OutOfMemory,
    QueueFull,
    UnknownName,
    Unready,
    UpstreamTimeout,
)
from shared.schemas.fields import Priority


@pytest.fixture
def model(zimage_model: ZImageModel) -> WatchedModel:
    return WatchedModel(zimage_model)


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.mark.parametrize("fields", [{}, {"guidance_scale": 2.0, "guided": True}, {"width": 96, "steps": 1}])
async def test_a_picture_is_what_the_model_draws(zimage_model: ZImageModel, fields: dict[str, Any]) -> None:
    guided = fields.pop("guided", False)
    async with running(zimage_model) as engine:
        picture = await draw(engine, request(**fields))
    assert np.array_equal(pixels_of(picture), drawn_by(zimage_model, guided=guided, **fields))
    timings = picture.timings
    assert min(timings.queue, timings.denoise, timings.decode, timings.png) >= 0
    assert timings.denoise > 0


class TestTogether:
    """Pictures of one shape share steps, those of several take turns."""

    async def test_each_gets_its_own(self, model: WatchedModel) -> None:
        async with running(model) as engine:
            engine.pictures.max_waiting = 100
            first = await hold(engine, model, width=128)
            seeds = range(8)
            tasks = [asyncio.create_task(draw(engine, request(seed=seed, steps=2 + seed % 3))) for seed in seeds]
            await eventually(lambda: len(engine.pictures.waiting) == len(tasks))
            model.gate.set()
            pictures = await asyncio.gather(*tasks)
            await first
        assert max(len(group) for group in model.steps) == len(tasks)
        assert max(len(group) for group in model.decoded) > 1
        for seed, picture in zip(seeds, pictures, strict=True):
            expected = drawn_by(model.inner, seed=seed, steps=2 + seed % 3).astype(int)
            assert np.abs(pixels_of(picture).astype(int) - expected).max() <= 1
            others = [np.abs(pixels_of(other).astype(int) - expected).max() for other in pictures if other != picture]
            assert min(others) > 5, "a test that pictures are not swapped needs pictures that differ"

    async def test_they_join_and_leave_between_steps(self, model: WatchedModel) -> None:
        async with running(model) as engine:
            first = await hold(engine, model, seed=1, steps=6)
            (second,) = await queue(engine, 1, steps=2)
            model.gate.set()
            await asyncio.gather(first, second)
        assert model.steps == [(1,), (1, 100), (1, 100), (1,), (1,), (1,)]

    async def test_sizes_take_turns(self, model: WatchedModel) -> None:
        async with running(model) as engine:
            long = await hold(engine, model, seed=1, steps=20)
            (short,) = await queue(engine, 1, steps=3, width=96)
            model.gate.set()
            await short
            assert not long.done()
            await long
        assert model.steps[:7] == [(1,), (1,), (100,), (1,), (100,), (1,), (100,)] or (
            model.steps[:6] == [(1,), (100,), (1,), (100,), (1,), (100,)]
        )

    async def test_lengths_and_guidance_are_apart(self, model: WatchedModel) -> None:
        async with running(model) as engine:
            first = await hold(engine, model, width=128, steps=1)
            wanted = [
                request(seed=1),
                request({"text": embeddings(40)}, seed=2),
                request(seed=3, guidance_scale=1.0),
                request({"text": embeddings(31)}, seed=4),
            ]
            engine.pictures.max_waiting = 10
            tasks = [asyncio.create_task(draw(engine, one)) for one in wanted]
            await eventually(lambda: len(engine.pictures.waiting) == len(tasks))
            model.gate.set()
            await asyncio.gather(first, *tasks)
        assert {frozenset(group) for group in model.steps[1:]} == {frozenset({1, 4}), frozenset({2}), frozenset({3})}

    async def test_at_most_as_many_as_the_limits_say(self, model: WatchedModel) -> None:
        limits = Limits(running=3, batch=2, batch_tokens=2560, decode_pixels=1)
        async with running(model, limits) as engine:
            engine.pictures.max_waiting = 10
            first = await hold(engine, model, seed=1, steps=2)
            tasks = await queue(engine, 5, steps=2)
            model.gate.set()
            await asyncio.gather(first, *tasks)
        assert max(map(len, model.steps)) == 2
        assert {len(group) for group in model.decoded} == {1}

    async def test_priority_then_age(self, model: WatchedModel) -> None:
        async with running(model, ONE_BY_ONE) as engine:
            engine.pictures.max_waiting = 10
            tasks = [await hold(engine, model, seed=0, steps=1)]
            asked = (Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.NORMAL, Priority.HIGH)
            for seed, priority in enumerate(asked, start=1):
                wanted = request(seed=seed, steps=1, priority=priority)
                tasks.append(asyncio.create_task(draw(engine, wanted)))
                await eventually(lambda expected=seed: len(engine.pictures.waiting) == expected)
            model.gate.set()
            await asyncio.gather(*tasks)
        assert model.steps == [(seed,) for seed in (0, 3, 5, 2, 4, 1)]


SENTENCE = r"must be at most \d+ pixels on this device, not 16384: it has"


class TestMemory:
    """What is begun fits; what can never fit is refused at once."""

    async def test_a_picture_beyond_the_device_is_refused_with_the_limit(self, model: WatchedModel) -> None:
        room = model.footprint.together([model.inner.start(parameters(), embeddings(20), None).shape])
        async with running(model, memory_bytes=room) as engine:
            with pytest.raises(InvalidField, match=SENTENCE) as no:
                await draw(engine, request(width=128, height=128))
            most = int(str(no.value).split("at most ")[1].split()[0])
            assert 64 * 64 <= most < 128 * 128
            await draw(engine, request())
        assert len(model.steps) == 4

    async def test_together_they_take_what_there_is_and_no_more(self, model: WatchedModel) -> None:
        shape = model.inner.start(parameters(), embeddings(20), None).shape
        async with running(model, memory_bytes=model.footprint.together([shape] * 2)) as engine:
            engine.pictures.max_waiting = 10
            first = await hold(engine, model, seed=1)
            tasks = await queue(engine, 4)
            model.gate.set()
            await asyncio.gather(first, *tasks)
        assert max(map(len, model.steps)) == 2

    async def test_a_device_that_others_have_filled(self, model: WatchedModel) -> None:
        async with running(model) as engine:
            model.free = 1000
            with pytest.raises(OutOfMemory):
                await draw(engine, request())
            model.free = 1 << 40
            await draw(engine, request())

    async def test_what_fits_only_if_it_is_decoded_in_tiles_is_drawn(self, model: WatchedModel) -> None:
        fields = {"width": 768, "height": 768, "steps": 1}
        shape = model.inner.start(parameters(**fields), embeddings(20), None).shape
        tiled = replace(model.footprint)
        assert tiled.decode_in_tiles(shape.pixels)
        assert tiled.together([shape]) < model.footprint.together([shape])
        async with running(model) as engine:
            model.free = tiled.together([shape])
            await draw(engine, request(**fields))
            assert model.footprint.tiled_above < shape.pixels
            model.free = 1 << 40
            await draw(engine, request())
            assert model.footprint.tiled_above == model.footprint.tiling_pixels

    async def test_beside_its_loras_a_picture_may_be_decoded_in_tiles(
        self, model: WatchedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is not refused though without them it would be decoded whole."""
        fields = {"width": 768, "height": 768, "steps": 1}
        shape = model.inner.start(parameters(**fields), embeddings(20), None).shape
        room = model.footprint.together([shape])
        taken = [room - model.footprint.least(shape)]
        assert taken[0] > 0
        monkeypatch.setattr(model.adapters, "choose", lambda _: (("ink", 1.0),))
        monkeypatch.setattr(model.adapters, "bytes_of", lambda names: taken[0] * len(set(names)))
        monkeypatch.setattr(model, "start", lambda wanted, text, *_: model.inner.start(wanted, text, None))
        async with running(model, memory_bytes=room) as engine:
            await draw(engine, request(**fields))
            assert model.footprint.tiled_above < shape.pixels
            taken[0] += 1
            with pytest.raises(InvalidField, match=r"must be at most \d+ pixels on this device, not 589824") as no:
                await draw(engine, request(**fields))
        most = int(str(no.value).split("at most ")[1].split()[0])
        assert 0.9 * shape.pixels < most < shape.pixels


class TestNews:
    """What is told of a picture on its way."""

    async def test_steps_previews_and_the_picture(self, zimage_model: ZImageModel) -> None:
        async with running(zimage_model) as engine:
            wanted = request(steps=5, preview_every=2, width=96)
            told = [item async for item in engine.generate(wanted, watched=True)]
        assert told[0] == Waits(1)
        steps = [item for item in told if isinstance(item, StepDone)]
        assert [(item.step, item.steps) for item in steps] == [(number, 5) for number in range(1, 6)]
        assert all(item.seconds_left >= 0 for item in steps)
        assert steps[-1].seconds_left == 0
        previews = [item for item in told if isinstance(item, PreviewReady)]
        assert [item.step for item in previews] == [2, 4]
        with Image.open(io.BytesIO(previews[0].jpeg)) as image:
            assert (image.format, image.size) == ("JPEG", (96 // 8, 64 // 8))
        assert isinstance(told[-1], Picture)
        assert sum(isinstance(item, Picture) for item in told) == 1

    async def test_places_in_the_queue(self, model: WatchedModel) -> None:
        async with running(model, ONE_BY_ONE) as engine:
            first = await hold(engine, model)
            (second,) = await queue(engine, 1)
            places: list[int] = []

            async def watch() -> None:
                async with aclosing(engine.generate(request(seed=5), watched=True)) as told:
                    async for item in told:
                        match item:
                            case Waits(place):
                                places.append(place)

            third = asyncio.create_task(watch())
            await eventually(lambda: places == [2])
            model.gate.set()
            await asyncio.gather(first, second, third)
        assert places == [2, 1]

    async def test_what_runs_can_be_seen(self, model: WatchedModel) -> None:
        async with running(model) as engine:
            assert engine.pictures.running == []
            task = await hold(engine, model, request_id="id-12345")
            (job,) = engine.pictures.running
            assert (job.request.request_id, job.step) == ("id-12345", 0)
            model.gate.set()
            await task
            await eventually(lambda: engine.pictures.running == [])
            assert job.step == 4
            assert job.denoising is None, "what is done holds no memory of the device"


async def test_a_full_queue_refuses_at_once(model: WatchedModel) -> None:
    async with running(model, ONE_BY_ONE) as engine:
        first = await hold(engine, model)
        waiting = await queue(engine, MAX_WAITING)
        with pytest.raises(QueueFull, match="3 pictures are waiting") as refused:
            await draw(engine, request())
        assert refused.value.retry_after_s == 5
        with pytest.raises(QueueFull):
            engine.check_room()
        model.gate.set()
        pictures = await asyncio.gather(first, *waiting)
        assert len(pictures) == 1 + MAX_WAITING
        engine.check_room()
        await draw(engine, request())


class TestGivingUp:
    """A picture that nobody waits for, or that somebody cancels, leaves the device at the next step."""

    async def test_while_it_runs(self, model: WatchedModel) -> None:
        async with running(model) as engine:
            task = await hold(engine, model, seed=1, steps=100)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
            model.gate.set()
            await draw(engine, request(seed=2))
        assert model.steps.count((1,)) == 1

    async def test_while_it_waits(self, model: WatchedModel) -> None:
        async with running(model, ONE_BY_ONE) as engine:
            first = await hold(engine, model, seed=1)
            dropped, kept = await queue(engine, 2)
            dropped.cancel()
            await asyncio.gather(dropped, return_exceptions=True)
            model.gate.set()
            await asyncio.gather(first, kept)
        assert (100,) not in model.steps
        assert model.steps.count((101,)) == 4

    async def test_they_take_no_place_in_the_queue(self, model: WatchedModel) -> None:
        async with running(model, ONE_BY_ONE) as engine:
            first = await hold(engine, model)
            dropped = await queue(engine, MAX_WAITING)
            for task in dropped:
                task.cancel()
            await asyncio.gather(*dropped, return_exceptions=True)
            assert engine.pictures.waiting == []
            kept = asyncio.create_task(draw(engine, request(seed=5)))
            await eventually(lambda: kept.done() or len(engine.pictures.waiting) == 1)
            model.gate.set()
            await asyncio.gather(first, kept)

    async def test_of_a_group_only_one_leaves(self, model: WatchedModel) -> None:
        async with running(model) as engine:
            first = await hold(engine, model, seed=1, steps=5)
            dropped, kept = await queue(engine, 2, steps=5)
            model.gate.set()
            await eventually(lambda: (1, 100, 101) in model.steps)
            dropped.cancel()
            pictures = await asyncio.gather(first, kept)
        assert model.steps.count((1, 100, 101)) < 5
        for seed, picture in zip((1, 101), pictures, strict=True):
            difference = pixels_of(picture).astype(int) - drawn_by(model.inner, seed=seed, steps=5).astype(int)
            assert np.abs(difference).max() <= 1

    @pytest.mark.parametrize("waits", [True, False])
    async def test_by_the_id_of_the_request(self, model: WatchedModel, *, waits: bool) -> None:
        async with running(model, ONE_BY_ONE) as engine:
            first = await hold(engine, model, seed=1, steps=100, request_id="id-1")
            (second,) = await queue(engine, 1, request_id="id-2")
            engine.cancel("id-2" if waits else "id-1")
            model.gate.set()
            with pytest.raises(Cancelled):
                await (second if waits else first)
            if waits:
                engine.cancel("id-1")
                with pytest.raises(Cancelled):
                    await first
            else:
                await second
            await eventually(lambda: engine.pictures.running == [])
            with pytest.raises(UnknownName):
                engine.cancel("id-1")
            await draw(engine, request())

    @pytest.mark.parametrize("waits", [True, False])
    async def test_at_its_deadline(self, model: WatchedModel, *, waits: bool) -> None:
        async with running(model, ONE_BY_ONE) as engine:
            first = await hold(engine, model, seed=1, steps=100, timeout_s=None if waits else 1.0)
            late = (await queue(engine, 1, timeout_s=0.05))[0] if waits else first
            with pytest.raises(UpstreamTimeout, match=r"not ready within (0\.05|1) s"):
                await late
            model.gate.set()
            if waits:
                first.cancel()
            await draw(engine, request(seed=3))
        assert model.steps.count((1,)) <= 2
        assert (100,) not in model.steps


async def test_unready_before_the_model_is_loaded(zimage_model: ZImageModel) -> None:
    may_load = threading.Event()

    def load() -> ZImageModel:
        may_load.wait(PATIENCE_S)
        return zimage_model

    engine = DiffusionEngine(load, LIMITS, max_waiting=3, png_compression=1)
    engine.device.start()
    with pytest.raises(Unready, match="being loaded"):
        await draw(engine, request())
    with pytest.raises(Unready):
        engine.check_room()
    with pytest.raises(Unready):
        _ = engine.facts
    may_load.set()
    await eventually(lambda: engine.device.unready_reason() is None)
    assert engine.facts == zimage_model.facts
    await engine.stop()


async def test_stop_refuses_what_waits_and_what_runs(model: WatchedModel) -> None:
    async with running(model, ONE_BY_ONE) as engine:
        runs = await hold(engine, model, steps=100)
        waits = await queue(engine, 2)
        stopping = asyncio.create_task(engine.stop())
        await eventually(lambda: engine.device.stopping)
        model.gate.set()
        await stopping
        with pytest.raises(Unready, match="stopping"):
            await runs
        for task in waits:
            with pytest.raises(NotBegun, match="stopping"):
                await task
        with pytest.raises(Unready, match="stopping"):
            await draw(engine, request())
        assert len(model.steps) <= 2
