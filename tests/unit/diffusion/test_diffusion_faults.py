"""Faults inside the engine: what breaks takes nobody with it, unless the device itself is lost."""

import asyncio
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from engines import LIMITS, ONE_BY_ONE, draw, drawn_by, hold, pixels_of, queue, request, running
from fakes import WatchedModel, embeddings
from inprocess import PATIENCE_S, eventually

from services.diffusion.denoising import Denoising
from services.diffusion.engine import DiffusionEngine, PreviewReady
from services.diffusion.model import ZImageModel
from shared.device_thread import EXIT_DEVICE_FAILED, DeviceThread
from shared.errors import DeviceFailed, InternalError, InvalidField, NotBegun, NumericalError, OutOfMemory, Unready
from shared.tensors import is_out_of_memory

FULL = OutOfMemory("The device has too little free memory for this picture.", retry_after_s=10)


@pytest.fixture
def model(zimage_model: ZImageModel) -> WatchedModel:
    return WatchedModel(zimage_model)


@pytest.fixture(autouse=True)
def log() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.mark.parametrize(
    ("error", "raised"), [(RuntimeError("a library's own text"), InternalError), (FULL, OutOfMemory)]
)
@pytest.mark.parametrize("stage", ["break_next", "break_decode"])
async def test_a_picture_that_breaks_fails_alone(
    model: WatchedModel, error: Exception, raised: type[Exception], stage: str
) -> None:
    async with running(model) as engine:
        getattr(model, stage).append(error)
        with pytest.raises(raised) as failed:
            await draw(engine, request())
        assert "library" not in str(failed.value)
        picture = await draw(engine, request())
        assert engine.device.unready_reason() is None
        await eventually(lambda: engine.pictures.running == [])
    assert np.array_equal(pixels_of(picture), drawn_by(model.inner))


@pytest.mark.parametrize("error", [FULL, RuntimeError("a library's own text")])
async def test_of_a_group_only_the_one_at_fault_fails(model: WatchedModel, error: Exception) -> None:
    def break_group(group: Sequence[Denoising]) -> Exception | None:
        return error if any(one.parameters.seed == 102 and one.step == 2 for one in group) else None

    async with running(model) as engine:
        engine.pictures.max_waiting = 10
        first = await hold(engine, model, seed=1)
        tasks = await queue(engine, 5)
        model.break_group = break_group
        model.gate.set()
        ends = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [isinstance(end, Exception) for end in ends] == [False, False, False, True, False, False]
    assert isinstance(ends[3], OutOfMemory if error is FULL else InternalError)
    for seed, picture in ((1, ends[0]), (100, ends[1]), (104, ends[5])):
        difference = pixels_of(picture).astype(int) - drawn_by(model.inner, seed=seed).astype(int)
        assert np.abs(difference).max() <= 1


async def test_a_group_that_is_too_large_goes_on_in_halves(model: WatchedModel) -> None:
    async with running(model) as engine:
        engine.pictures.max_waiting = 10
        first = await hold(engine, model, seed=1, steps=3)
        tasks = await queue(engine, 3, steps=3)
        model.break_group = lambda group: FULL if len(group) > 2 else None
        shapes = [job.shape for job in engine.pictures.running] * 2
        before = model.footprint.together(shapes)
        model.gate.set()
        await asyncio.gather(first, *tasks)
        assert model.footprint.together(shapes) > before, "what did not fit is expected to take more from now on"
    assert [len(group) for group in model.steps].count(4) == 1, "what did not fit is not tried at every step"


async def test_a_group_that_went_on_in_halves_grows_again(model: WatchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.diffusion.group_sizes.PROVEN_STEPS", 3)
    full = [FULL]
    async with running(model) as engine:
        engine.pictures.max_waiting = 10
        first = await hold(engine, model, seed=1, steps=12)
        tasks = await queue(engine, 3, steps=12)
        model.break_group = lambda group: full.pop() if full and len(group) == 4 else None
        model.gate.set()
        await asyncio.gather(first, *tasks)
    sizes = [len(group) for group in model.steps]
    assert sizes[1:5] == [4, 2, 2, 2]
    assert sizes.index(3) < len(sizes) - 1 - sizes[::-1].index(4)


async def test_who_leaves_while_others_are_decoded_is_not_decoded(
    model: WatchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    async with running(model, replace(LIMITS, decode_pixels=1)) as engine:
        first = await hold(engine, model, seed=1, steps=2)
        tasks = await queue(engine, 3, steps=1)
        decode = model.decode

        def leaving(pictures: Sequence[Denoising]) -> Sequence[Any]:
            loop.call_soon_threadsafe(tasks[1].cancel)
            end = time.monotonic() + PATIENCE_S
            while not any(job.cancelled for job in engine.pictures.running) and time.monotonic() < end:
                time.sleep(0.002)
            monkeypatch.setattr(model, "decode", decode)
            return decode(pictures)

        monkeypatch.setattr(model, "decode", leaving)
        model.gate.set()
        ends = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [isinstance(end, asyncio.CancelledError) for end in ends] == [False, False, True, False]
    assert model.decoded == [(1,), (100,), (102,)]


@pytest.mark.slow
async def test_a_picture_too_large_to_be_decoded_whole_is_decoded_in_tiles(model: WatchedModel) -> None:
    fields = {"seed": 1, "width": 768, "height": 768, "steps": 1}
    whole = drawn_by(model.inner, **fields)
    model.inner.footprint = model.footprint
    async with running(model) as engine:
        model.break_decode.append(FULL)
        picture = await draw(engine, request(**fields))
    assert model.decoded == [(1,), (1,)]
    assert model.footprint.tiled_above < 768 * 768
    assert np.array_equal(pixels_of(picture), drawn_by(model.inner, **fields))
    assert not np.array_equal(pixels_of(picture), whole)


async def test_pictures_too_large_to_be_decoded_at_once_are_decoded_one_by_one(model: WatchedModel) -> None:
    async with running(model) as engine:
        first = await hold(engine, model, seed=1, steps=2)
        tasks = await queue(engine, 1, steps=1)
        model.break_decode.append(FULL)
        model.gate.set()
        pictures = await asyncio.gather(first, *tasks)
    assert model.decoded == [(1, 100), (1,), (100,)]
    assert np.array_equal(pixels_of(pictures[1]), drawn_by(model.inner, seed=100, steps=1))


@pytest.mark.parametrize("stage", ["break_next", "break_decode"])
async def test_an_error_on_a_full_device_is_told_as_too_little_memory(
    model: WatchedModel, log: list[Any], stage: str
) -> None:
    """A library's error may be how it says so, and a look at the device then fails for want of memory as well."""
    async with running(model) as engine:
        getattr(model, stage).append(RuntimeError("a library's own text"))
        model.break_device.append(FULL)
        with pytest.raises(OutOfMemory) as failed:
            await draw(engine, request())
        assert failed.value.__context__ is None, "the error's frames may hold the tensors that fill the device"
        assert engine.device.unready_reason() is None
        picture = await draw(engine, request())
    assert model.break_device == []
    assert np.array_equal(pixels_of(picture), drawn_by(model.inner))
    assert "the device ran out of memory" in [entry["event"] for entry in log]


async def test_a_group_that_fails_on_a_full_device_goes_on_in_halves(model: WatchedModel) -> None:
    def break_group(group: Sequence[Denoising]) -> Exception | None:
        if len(group) <= 2:
            return None
        model.break_device.append(FULL)
        return RuntimeError("a library's own text")

    async with running(model) as engine:
        engine.pictures.max_waiting = 10
        first = await hold(engine, model, seed=1, steps=3)
        tasks = await queue(engine, 3, steps=3)
        model.break_group = break_group
        model.gate.set()
        await asyncio.gather(first, *tasks)
    assert [len(group) for group in model.steps].count(4) == 1, "what did not fit is not tried at every step"


async def test_numbers_that_overflow_name_the_step(model: WatchedModel) -> None:
    def overflow(group: Sequence[Denoising]) -> None:
        for one in group:
            if one.parameters.seed == 100 and one.step == 2:
                one.latents = torch.full_like(one.latents, float("nan"))

    async with running(model) as engine:
        first = await hold(engine, model, seed=1)
        (broken,) = await queue(engine, 1, steps=9)
        model.break_group = overflow
        model.gate.set()
        with pytest.raises(NumericalError, match="overflowed at step 3 of 9; try another seed or float32 weights"):
            await broken
        picture = await first
    difference = pixels_of(picture).astype(int) - drawn_by(model.inner, seed=1).astype(int)
    assert np.abs(difference).max() <= 1


async def test_embeddings_that_are_not_finite_fail_alone(zimage_model: ZImageModel) -> None:
    async with running(zimage_model) as engine:
        with pytest.raises(InvalidField, match="'text' hold values"):
            await draw(engine, request({"text": torch.full((3, 64), float("nan"))}))
        broken = {"text": embeddings(20), "negative": torch.full((3, 64), float("inf"))}
        with pytest.raises(InvalidField, match="'negative' hold values"):
            await draw(engine, request(broken, guidance_scale=2.0))
        await draw(engine, request(broken))  # without guidance nobody looks at them


async def test_a_preview_that_fails_costs_nobody_the_picture(
    model: WatchedModel, monkeypatch: pytest.MonkeyPatch, log: list[Any]
) -> None:
    failing: list[Exception] = [FULL, RuntimeError("a library's own text"), FULL]

    def preview(_: Denoising) -> None:
        raise failing.pop()

    monkeypatch.setattr(model, "preview", preview)
    async with running(model) as engine:
        told = [item async for item in engine.generate(request(preview_every=1, steps=4), watched=True)]
        assert engine.device.unready_reason() is None
    assert failing == []
    assert not any(isinstance(item, PreviewReady) for item in told)
    assert np.array_equal(pixels_of(told[-1]), drawn_by(model.inner))
    assert [entry["event"] for entry in log].count("the device ran out of memory") == 2


async def test_what_was_chosen_but_not_begun_is_told_so(model: WatchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway sends such a picture again; one that was in the making is lost."""

    def start(wanted: Any, *arguments: Any) -> Denoising:
        if wanted.seed == 100:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        return model.inner.start(wanted, *arguments)

    async with running(model) as engine:
        first = await hold(engine, model)
        tasks = await queue(engine, 2)
        monkeypatch.setattr(model, "start", start)
        model.gate.set()
        ends = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [type(end) for end in ends] == [DeviceFailed, NotBegun, NotBegun]


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_device_that_is_lost_ends_the_process(model: WatchedModel, log: list[Any], *, at_once: bool) -> None:
    """After a CUDA assert every later call fails: all are told at once, and the process exits to be started again."""
    statuses: list[int] = []
    engine = DiffusionEngine(lambda: model, ONE_BY_ONE, max_waiting=3, png_compression=1, on_failure=statuses.append)
    engine.device.start()
    await eventually(lambda: engine.device.unready_reason() is None)
    lost = torch.AcceleratorError("CUDA error: device-side assert triggered")
    if at_once:
        model.break_next.append(lost)
    else:  # a library's error, after which the device does not answer
        model.break_next.append(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"))
        model.break_device.append(lost)
    runs = await hold(engine, model)
    waits = await queue(engine, 2)
    model.gate.set()
    with pytest.raises(DeviceFailed, match="starts anew") as failed:
        await runs
    assert failed.value.retry_after_s
    assert "CUDA" not in str(failed.value)
    for task in waits:
        with pytest.raises(NotBegun, match="before it had begun"):
            await task
    try:
        await eventually(lambda: statuses)
        assert statuses == [EXIT_DEVICE_FAILED]
        assert engine.device.unready_reason() == "the device failed"
        with pytest.raises(Unready):
            await draw(engine, request())
        with pytest.MonkeyPatch.context() as patch, pytest.raises(NotBegun):
            patch.setattr(DeviceThread, "model", model)  # as it was when this one came and its LoRAs were looked up
            async with asyncio.timeout(30):
                await draw(engine, request())
        assert engine.pictures.running == engine.pictures.waiting == []
    finally:
        await engine.stop()


class Hungry:
    """A part that holds memory for a while and then finds the device full, as a large forward does."""

    def __init__(self, part: Any) -> None:
        self.part = part
        self.held: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        activations = torch.zeros(1000)
        self.held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def hungry(zimage_model: ZImageModel) -> Hungry:
    return Hungry(zimage_model.parts.transformer)


@pytest.fixture
def hungry_model(zimage_model: ZImageModel, hungry: Hungry) -> ZImageModel:
    return ZImageModel(replace(zimage_model.parts, transformer=hungry), replace(zimage_model.footprint))


async def test_memory_is_free_again_when_the_error_is_told(hungry: Hungry, hungry_model: ZImageModel) -> None:
    async with running(hungry_model) as engine:
        with pytest.raises(OutOfMemory) as failed:
            await draw(engine, request())
        assert [one() for one in hungry.held] == [None], "the error must not hold on to the forward's tensors"
        assert failed.value.__context__ is None


def test_allocations_that_fail_on_the_cpu_are_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(failed.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
