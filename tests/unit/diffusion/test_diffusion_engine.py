"""`DiffusionEngine` on the tiny checkpoint: the queue's bound, cancelling, failures and the end."""

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from fakes import PATIENCE_S, WatchedModel, embeddings, message, parameters
from inprocess import eventually
from PIL import Image

from services.diffusion.engine import DiffusionEngine, Picture, PictureRequest
from services.diffusion.model import ZImageModel
from shared.device_thread import EXIT_DEVICE_FAILED
from shared.errors import InternalError, InvalidField, NumericalError, OutOfMemory, QueueFull, Unready
from shared.wire import parse_header

MAX_WAITING = 3


@pytest.fixture
def model(zimage_model: ZImageModel) -> WatchedModel:
    return WatchedModel(zimage_model)


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@asynccontextmanager
async def running(model: ZImageModel) -> AsyncIterator[DiffusionEngine]:
    engine = DiffusionEngine(lambda: model, max_waiting=MAX_WAITING, png_compression=1)
    engine.device.start()
    await eventually(lambda: engine.device.unready_reason() is None)
    try:
        yield engine
    finally:
        if isinstance(model, WatchedModel):
            model.gate.set()
        await engine.stop()


def request(tensors: dict[str, torch.Tensor] | None = None, request_id: str | None = None, **fields: Any) -> Any:
    body = bytearray(message(tensors=tensors, **fields))
    return PictureRequest(parameters(**fields), body, parse_header(body), request_id)


def pixels_of(picture: Picture) -> np.ndarray:
    with Image.open(io.BytesIO(picture.png)) as image:
        return np.asarray(image)


def drawn_by(model: ZImageModel, *, guided: bool = False, **fields: Any) -> np.ndarray:
    """What the model draws without an engine."""
    negative = embeddings(5, seed=2) if guided else None
    picture = model.start(parameters(**fields), embeddings(20), negative)
    while not picture.finished:
        model.step([picture])
    return model.decode(picture)


async def hold(engine: DiffusionEngine, model: WatchedModel, **fields: Any) -> asyncio.Task[Picture]:
    """A picture that stands in its first step until the gate opens."""
    model.gate.clear()
    model.entered.clear()
    task = asyncio.create_task(engine.generate(request(**fields)))
    await eventually(model.entered.is_set)
    return task


async def queue(engine: DiffusionEngine, count: int, **fields: Any) -> list[asyncio.Task[Picture]]:
    """Pictures that wait, in this order."""
    tasks = []
    for number in range(count):
        tasks.append(asyncio.create_task(engine.generate(request(seed=100 + number, **fields))))
        await eventually(lambda expected=number + 1: engine.waiting == expected)
    return tasks


@pytest.mark.parametrize("fields", [{}, {"guidance_scale": 2.0, "guided": True}, {"width": 96, "steps": 1}])
async def test_a_picture_is_what_the_model_draws(zimage_model: ZImageModel, fields: dict[str, Any]) -> None:
    guided = fields.pop("guided", False)
    async with running(zimage_model) as engine:
        picture = await engine.generate(request(**fields))
    assert np.array_equal(pixels_of(picture), drawn_by(zimage_model, guided=guided, **fields))
    timings = picture.timings
    assert min(timings.queue, timings.denoise, timings.decode, timings.png) >= 0
    assert timings.denoise > 0


async def test_many_pictures_at_once_each_get_their_own(zimage_model: ZImageModel) -> None:
    async with running(zimage_model) as engine:
        engine.max_waiting = 100
        pictures = await asyncio.gather(*(engine.generate(request(seed=seed, steps=2)) for seed in range(8)))
    for seed, picture in enumerate(pictures):
        difference = pixels_of(picture).astype(int) - drawn_by(zimage_model, seed=seed, steps=2).astype(int)
        assert np.abs(difference).max() <= 1


async def test_a_full_queue_refuses_at_once(model: WatchedModel) -> None:
    async with running(model) as engine:
        first = await hold(engine, model)
        waiting = await queue(engine, MAX_WAITING)
        with pytest.raises(QueueFull, match="3 pictures are waiting") as refused:
            await engine.generate(request())
        assert refused.value.retry_after_s == 5
        with pytest.raises(QueueFull):
            engine.check_room()
        model.gate.set()
        pictures = await asyncio.gather(first, *waiting)
        assert len(pictures) == 1 + MAX_WAITING
        engine.check_room()
        await engine.generate(request())


async def test_what_runs_can_be_seen(model: WatchedModel) -> None:
    async with running(model) as engine:
        assert engine.running == []
        task = await hold(engine, model, request_id="id-12345")
        (job,) = engine.running
        assert (job.request.request_id, job.step) == ("id-12345", 0)
        model.gate.set()
        await task
        await eventually(lambda: engine.running == [])
        assert job.step == 4


async def test_a_picture_that_is_cancelled_while_it_runs_stops_at_the_next_step(model: WatchedModel) -> None:
    async with running(model) as engine:
        task = await hold(engine, model, seed=1, steps=100)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        model.gate.set()
        await engine.generate(request(seed=2))
        assert model.steps.count((1,)) == 1


async def test_a_picture_that_is_cancelled_while_it_waits_is_never_begun(model: WatchedModel) -> None:
    async with running(model) as engine:
        first = await hold(engine, model, seed=1)
        dropped, kept = await queue(engine, 2)
        dropped.cancel()
        await asyncio.gather(dropped, return_exceptions=True)
        model.gate.set()
        await asyncio.gather(first, kept)
        assert (100,) not in model.steps
        assert model.steps.count((101,)) == 4


async def test_cancelled_pictures_take_no_place_in_the_queue(model: WatchedModel) -> None:
    async with running(model) as engine:
        first = await hold(engine, model)
        dropped = await queue(engine, MAX_WAITING)
        for task in dropped:
            task.cancel()
        await asyncio.gather(*dropped, return_exceptions=True)
        assert engine.waiting == 0
        kept = asyncio.create_task(engine.generate(request(seed=5)))
        await eventually(lambda: kept.done() or engine.waiting == 1)
        model.gate.set()
        await asyncio.gather(first, kept)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("a library's own text"), InternalError),
        (OutOfMemory("The device has too little free memory.", retry_after_s=10), OutOfMemory),
        (NumericalError("The model's numbers overflowed."), NumericalError),
    ],
)
@pytest.mark.parametrize("stage", ["break_next", "break_decode"])
async def test_a_picture_that_breaks_fails_alone(
    model: WatchedModel, error: Exception, raised: type[Exception], stage: str
) -> None:
    async with running(model) as engine:
        getattr(model, stage).append(error)
        with pytest.raises(raised) as failed:
            await engine.generate(request())
        assert "library" not in str(failed.value)
        picture = await engine.generate(request())
        assert engine.device.unready_reason() is None
        await eventually(lambda: engine.running == [])
    assert np.array_equal(pixels_of(picture), drawn_by(model.inner))


async def test_embeddings_that_are_not_finite_fail_alone(zimage_model: ZImageModel) -> None:
    async with running(zimage_model) as engine:
        with pytest.raises(InvalidField, match="'text' hold values"):
            await engine.generate(request({"text": torch.full((3, 64), float("nan"))}))
        broken = {"text": embeddings(20), "negative": torch.full((3, 64), float("inf"))}
        with pytest.raises(InvalidField, match="'negative' hold values"):
            await engine.generate(request(broken, guidance_scale=2.0))
        await engine.generate(request(broken))  # without guidance nobody looks at them


async def test_a_device_that_is_lost_ends_the_process(model: WatchedModel) -> None:
    """After a CUDA assert every later call fails: the service must say so and exit for its supervisor to restart it."""
    statuses: list[int] = []
    engine = DiffusionEngine(lambda: model, max_waiting=3, png_compression=1, on_failure=statuses.append)
    engine.device.start()
    await eventually(lambda: engine.device.unready_reason() is None)
    model.break_next.append(torch.AcceleratorError("CUDA error: device-side assert triggered"))
    with pytest.raises((InternalError, Unready)) as failed:
        await engine.generate(request())
    assert "CUDA" not in str(failed.value)
    try:
        await eventually(lambda: statuses)
        assert statuses == [EXIT_DEVICE_FAILED]
        assert engine.device.unready_reason() == "the device failed"
        with pytest.raises(Unready):
            await engine.generate(request())
    finally:
        await engine.stop()


async def test_unready_before_the_model_is_loaded(zimage_model: ZImageModel) -> None:
    may_load = threading.Event()

    def load() -> ZImageModel:
        may_load.wait(PATIENCE_S)
        return zimage_model

    engine = DiffusionEngine(load, max_waiting=3, png_compression=1)
    engine.device.start()
    with pytest.raises(Unready, match="being loaded"):
        await engine.generate(request())
    with pytest.raises(Unready):
        engine.check_room()
    with pytest.raises(Unready):
        _ = engine.facts
    may_load.set()
    await eventually(lambda: engine.device.unready_reason() is None)
    assert engine.facts == zimage_model.facts
    await engine.stop()


async def test_stop_refuses_what_waits_and_what_runs(model: WatchedModel) -> None:
    async with running(model) as engine:
        runs = await hold(engine, model, steps=100)
        waits = await queue(engine, 2)
        stopping = asyncio.create_task(engine.stop())
        await eventually(lambda: engine.device.stopping)
        model.gate.set()
        await stopping
        for task in (runs, *waits):
            with pytest.raises(Unready, match="stopping"):
                await task
        with pytest.raises(Unready, match="stopping"):
            await engine.generate(request())
        assert len(model.steps) <= 2
