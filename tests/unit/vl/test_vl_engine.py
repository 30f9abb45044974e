"""The engine around the real model: the queue, and weights that leave and come back."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from inprocess import eventually
from pictures import encoded, pixels

from services.vl.engine import Limits, VlEngine
from services.vl.model import Inputs, VisionModel
from services.vl.settings import VlSettings
from shared.device_thread import EXIT_DEVICE_FAILED, DeviceThread
from shared.errors import DeviceFailed, InternalError, InvalidField, NotBegun, OutOfMemory, QueueFull, Unready
from shared.schemas.rewriter import Rewritten
from shared.schemas.vl import DescribeParameters, ExtractParameters

PICTURE = encoded()


class GatedModel(VisionModel):
    """The real model, whose forwards wait at a gate and can be made to break; its loading is counted."""

    def __init__(self, inner: VisionModel) -> None:
        self.__dict__.update(inner.__dict__)
        self._weights = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.loads = 0
        self.break_next: list[Exception] = []

    def load(self) -> None:
        self.loads += not self.loaded
        super().load()

    def hidden_states(self, inputs: Inputs, layer: int, *, image_tokens_only: bool) -> torch.Tensor:
        self.entered.set()
        assert self.gate.wait(30)
        if self.break_next:
            raise self.break_next.pop()
        return super().hidden_states(inputs, layer, image_tokens_only=image_tokens_only)


@pytest.fixture
def gated(vision_model: VisionModel) -> GatedModel:
    return GatedModel(vision_model)


@asynccontextmanager
async def running(
    model: VisionModel,
    *,
    auto_unload: bool = True,
    max_waiting: int = 4,
    on_failure: Callable[[int], None] | None = None,
) -> AsyncIterator[VlEngine]:
    limits = Limits(max_waiting=max_waiting, max_tokens=8192)
    engine = VlEngine(lambda: model, limits, VlSettings(), auto_unload=auto_unload, on_failure=on_failure)
    engine.device.start()
    await eventually(lambda: engine.device.unready_reason() is None)
    yield engine
    await engine.stop()


def parameters(**fields: Any) -> ExtractParameters:
    wanted = {"hidden_layer": -2, "image_tokens_only": False, "scale_to_text": True, **fields}
    return ExtractParameters(**wanted)


async def description(engine: VlEngine, wanted: DescribeParameters) -> Rewritten:
    """The whole text."""
    *_, last = [piece async for piece in engine.describe(PICTURE, wanted)]
    assert isinstance(last, Rewritten)
    return last


async def test_an_extraction(gated: GatedModel) -> None:
    async with running(gated) as engine:
        extraction = await engine.extract(PICTURE, parameters())
        assert extraction.scaled_std == pytest.approx(58.75, rel=1e-4)
        assert extraction.states.shape[1] == gated.facts.width
        plain = await engine.extract(PICTURE, parameters(scale_to_text=False))
        assert plain.scaled_std == plain.original_std == pytest.approx(extraction.original_std)


@pytest.mark.parametrize("auto_unload", [True, False])
async def test_weights_leave_only_where_they_shall(gated: GatedModel, *, auto_unload: bool) -> None:
    async with running(gated, auto_unload=auto_unload) as engine:
        first = await engine.extract(PICTURE, parameters())
        if auto_unload:
            await eventually(lambda: not gated.loaded)
        second = await engine.extract(PICTURE, parameters())
        assert torch.equal(first.states, second.states)
        assert gated.loads == (2 if auto_unload else 1)
        assert gated.loaded is not auto_unload or not (await eventually(lambda: not gated.loaded))


async def test_concurrent_requests_share_one_loading(gated: GatedModel) -> None:
    async with running(gated, max_waiting=8) as engine:
        gated.gate.clear()
        pictures = [encoded(pixels(seed=index)) for index in range(6)]
        works = [asyncio.create_task(engine.extract(picture, parameters())) for picture in pictures]
        await eventually(lambda: engine.waiting == 6 and gated.entered.is_set())
        gated.gate.set()
        found = await asyncio.gather(*works)
        assert gated.loads <= 2
        assert len({item.states.numpy().tobytes() for item in found}) == 6
        await eventually(lambda: not gated.loaded)


async def test_a_full_queue_refuses_at_once(gated: GatedModel) -> None:
    async with running(gated, max_waiting=2) as engine:
        gated.gate.clear()
        works = [asyncio.create_task(engine.extract(PICTURE, parameters())) for _ in range(2)]
        await eventually(lambda: engine.waiting == 2)
        with pytest.raises(QueueFull):
            await engine.extract(PICTURE, parameters())
        gated.gate.set()
        await asyncio.gather(*works)
        assert engine.waiting == 0


async def test_who_goes_away_leaves_the_queue(gated: GatedModel) -> None:
    async with running(gated) as engine:
        gated.gate.clear()
        first = asyncio.create_task(engine.extract(PICTURE, parameters()))
        await eventually(gated.entered.is_set)
        second = asyncio.create_task(engine.extract(PICTURE, parameters()))
        await eventually(lambda: engine.waiting == 2)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert engine.waiting == 1
        gated.gate.set()
        await first


async def test_a_decoding_counts_until_it_is_done(gated: GatedModel) -> None:
    """Those who go away leave no thread behind that others are not told of."""
    going, most, gate, lock = 0, 0, threading.Event(), threading.Lock()
    inner = gated.prepare

    def prepare(*arguments: Any, **options: Any) -> Inputs:
        nonlocal going, most
        with lock:
            going, most = going + 1, max(most, going + 1)
        assert gate.wait(30)
        with lock:
            going -= 1
        return inner(*arguments, **options)

    gated.prepare = prepare  # type: ignore[method-assign]
    async with running(gated, max_waiting=16) as engine:
        tasks = [asyncio.create_task(engine.extract(PICTURE, parameters())) for _ in range(6)]
        for task in tasks:
            await asyncio.sleep(0.02)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        gate.set()
        await engine.extract(PICTURE, parameters())
    assert 1 <= most <= 2


async def test_one_bad_picture_does_not_end_the_service(gated: GatedModel) -> None:
    async with running(gated) as engine:
        gated.break_next.append(ValueError("secret"))
        with pytest.raises(InternalError, match="could not be read"):
            await engine.extract(PICTURE, parameters())
        with pytest.raises(InvalidField):
            await engine.extract(b"GIF89a", parameters())
        with pytest.raises(InvalidField, match="hidden_layer"):
            await engine.extract(PICTURE, ExtractParameters.model_construct(hidden_layer=-20))
        assert (await engine.extract(PICTURE, parameters())).states.isfinite().all()


async def test_a_device_that_is_lost_ends_the_process(gated: GatedModel) -> None:
    """Those who wait are told at once, not only when the process has stopped."""
    statuses: list[int] = []
    async with running(gated, on_failure=statuses.append) as engine:
        gated.gate.clear()
        gated.break_next.append(torch.AcceleratorError("CUDA error: device-side assert triggered"))
        first = asyncio.create_task(engine.extract(PICTURE, parameters()))
        await eventually(gated.entered.is_set)
        others = [
            asyncio.create_task(engine.extract(PICTURE, parameters())),
            asyncio.create_task(description(engine, DescribeParameters(prompt="What is it?"))),
        ]
        await eventually(lambda: len(engine._extractions) == len(engine._descriptions) == 1)
        gated.gate.set()
        async with asyncio.timeout(30):
            ends = await asyncio.gather(first, *others, return_exceptions=True)
        assert [type(end) for end in ends] == [DeviceFailed, NotBegun, DeviceFailed]
        await eventually(lambda: statuses)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(NotBegun):
            patch.setattr(DeviceThread, "model", gated)  # as it was when this one came and began to be decoded
            async with asyncio.timeout(30):
                await engine.extract(PICTURE, parameters())
    assert statuses == [EXIT_DEVICE_FAILED]


async def test_after_memory_ran_out_the_weights_can_go(gated: GatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """No error holds on to them: what is said to be unloaded is."""
    gone: list[weakref.ref[Any]] = []

    def run_out(_self: VisionModel, _inputs: Inputs, *_: Any, **__: Any) -> torch.Tensor:
        weights = gated._weights  # a frame of the forward that the error knows
        gone.append(weakref.ref(weights.model))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VisionModel, "_hidden_states", run_out)
    gc.disable()  # else it may be luck
    try:
        async with running(gated) as engine:
            with pytest.raises(OutOfMemory):
                await engine.extract(PICTURE, parameters())
            await eventually(lambda: not engine.loaded)
            await eventually(lambda: gone[0]() is None)
    finally:
        gc.enable()


async def test_descriptions_and_extractions_take_turns(gated: GatedModel) -> None:
    async with running(gated) as engine:
        wanted = DescribeParameters(prompt="What is it?", max_tokens=12, temperature=0.8, seed=3)
        alone = await description(engine, wanted)
        assert (alone.seed, alone.finish_reason in ("stop", "length")) == (3, True)
        described = [asyncio.create_task(description(engine, wanted)) for _ in range(2)]
        extracted = await engine.extract(PICTURE, parameters())
        assert extracted.states.isfinite().all()
        assert {(await work).rewritten_prompt for work in described} == {alone.rewritten_prompt}
        await eventually(lambda: not gated.loaded)


async def test_a_description_that_nobody_waits_for_ends(gated: GatedModel) -> None:
    async with running(gated) as engine:
        work = asyncio.create_task(description(engine, DescribeParameters(prompt="x", max_tokens=30_000)))
        await eventually(lambda: gated.loaded)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        await eventually(lambda: not gated.loaded)
        assert (await engine.extract(PICTURE, parameters())).states.isfinite().all()


async def test_who_stops_following_a_description_ends_it(gated: GatedModel) -> None:
    async with running(gated) as engine:
        following = engine.describe(PICTURE, DescribeParameters(prompt="x", max_tokens=30_000))
        assert await anext(following)
        await following.aclose()
        assert engine.waiting == 0
        await eventually(lambda: not gated.loaded)


async def test_a_description_that_nobody_reads_keeps_no_other_waiting(gated: GatedModel) -> None:
    async with running(gated) as engine:
        unread = engine.describe(PICTURE, DescribeParameters(prompt="x", max_tokens=4, seed=1))
        await anext(unread)
        assert (await description(engine, DescribeParameters(prompt="y", max_tokens=4))).backend == "local"
        await unread.aclose()


async def test_the_end_refuses_what_waits(gated: GatedModel) -> None:
    async with running(gated) as engine:
        gated.gate.clear()
        works = [asyncio.create_task(engine.extract(PICTURE, parameters())) for _ in range(2)]
        await eventually(lambda: engine.waiting == 2 and gated.entered.is_set())
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0)
        gated.gate.set()
        await stopping
        results = await asyncio.gather(*works, return_exceptions=True)
        assert any(isinstance(result, Unready) for result in results) or len(results) == 2
        with pytest.raises(Unready):
            await engine.extract(PICTURE, parameters())
