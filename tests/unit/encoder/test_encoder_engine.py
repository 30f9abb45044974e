"""`EncoderEngine` on the tiny checkpoint: batching, the queue's bound, cancelling, failures and the end."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest
import structlog
import torch
from inprocess import eventually

from services.encoder.engine import EncoderEngine, Limits
from services.encoder.model import TextEncoder
from shared.device_thread import EXIT_DEVICE_FAILED, DeviceThread
from shared.errors import DeviceFailed, InternalError, InvalidField, NotBegun, OutOfMemory, QueueFull, Unready
from shared.language.generations import WritingLimits

PATIENCE_S = 30.0


class Watched(TextEncoder):
    """The real encoder, whose forwards are counted and wait for a gate."""

    def __init__(self, inner: TextEncoder) -> None:
        self.inner, self.facts = inner, inner.facts
        self.forwards: list[list[int]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.break_next: list[Exception] = []

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return self.inner.tokenize(texts)

    def check_layer(self, layer: int) -> None:
        self.inner.check_layer(layer)

    def hidden_states(self, batch: Sequence[Sequence[int]], layer: int) -> list[torch.Tensor]:
        self.forwards.append([len(ids) for ids in batch])
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        if self.break_next:
            raise self.break_next.pop(0)
        return self.inner.hidden_states(batch, layer)


@pytest.fixture
def model(text_encoder: TextEncoder) -> Watched:
    return Watched(text_encoder)


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


LIMITS = Limits(max_batch_tokens=4096, max_batch_texts=64, max_waiting=20, max_tokens=500)
WRITING = WritingLimits(max_running=4, max_waiting=4, max_cache_tokens=4096)


@asynccontextmanager
async def running(model: TextEncoder, limits: Limits = LIMITS) -> AsyncIterator[EncoderEngine]:
    engine = EncoderEngine(lambda: model, limits, WRITING)
    engine.device.start()
    await eventually(lambda: engine.device.unready_reason() is None)
    try:
        yield engine
    finally:
        await engine.stop()


@asynccontextmanager
async def busy(engine: EncoderEngine, model: Watched) -> AsyncIterator[Callable[[], None]]:
    """A forward runs until the yielded function is called, or the block ends."""
    model.gate.clear()
    model.entered.clear()
    first = asyncio.create_task(engine.encode(["busy"], layer=-2))
    await eventually(model.entered.is_set)
    try:
        yield model.gate.set
    finally:
        model.gate.set()
        await asyncio.gather(first, return_exceptions=True)


async def test_states_and_token_counts(text_encoder: TextEncoder) -> None:
    async with running(text_encoder) as engine:
        texts = ["A cat", "A cat sleeping in the sun", "两只猫"]
        encoded = await engine.encode(texts, layer=-2)
        tokens = await engine.tokenize(texts)
    assert [item.tokens for item in encoded] == [len(ids) for ids in tokens]
    for item, ids in zip(encoded, tokens, strict=True):
        (alone,) = text_encoder.hidden_states([ids], -2)
        torch.testing.assert_close(item.states, alone, rtol=1e-5, atol=1e-5)


async def test_texts_of_different_requests_share_a_forward(model: Watched) -> None:
    async with running(model) as engine:
        async with busy(engine, model) as release:
            requests = [asyncio.create_task(engine.encode([f"cat number {n}"], layer=-2)) for n in range(12)]
            await eventually(lambda: engine.waiting == 12)
            release()
            answers = await asyncio.gather(*requests)
        assert [len(batch) for batch in model.forwards] == [1, 12]
        assert model.threads == {"encoder"}
        for number, (item,) in enumerate(answers):
            (ids,) = await engine.tokenize([f"cat number {number}"])
            torch.testing.assert_close(item.states, model.inner.hidden_states([ids], -2)[0], rtol=1e-5, atol=1e-5)


async def test_layers_are_kept_apart(model: Watched) -> None:
    async with running(model) as engine:
        async with busy(engine, model) as release:
            requests = [asyncio.create_task(engine.encode(["a cat"], layer=layer)) for layer in (-1, -2, -1, -3)]
            await eventually(lambda: engine.waiting == 4)
            release()
            answers = await asyncio.gather(*requests)
        assert sorted(len(batch) for batch in model.forwards) == [1, 1, 1, 2]
        (ids,) = await engine.tokenize(["a cat"])
        for (item,), layer in zip(answers, (-1, -2, -1, -3), strict=True):
            torch.testing.assert_close(item.states, model.inner.hidden_states([ids], layer)[0], rtol=1e-5, atol=1e-5)


async def test_the_limits_of_a_batch(model: Watched) -> None:
    limits = Limits(max_batch_tokens=4096, max_batch_texts=5, max_waiting=20, max_tokens=500)
    async with running(model, limits) as engine:
        await engine.encode(["a cat"] * 12, layer=-2)
    assert sorted(map(len, model.forwards)) == [2, 5, 5]


async def test_a_full_queue_refuses_at_once(model: Watched) -> None:
    async with running(model) as engine:
        async with busy(engine, model) as release:
            waiting = asyncio.create_task(engine.encode(["a cat"] * 20, layer=-2))
            await eventually(lambda: engine.waiting == 20)
            with pytest.raises(QueueFull, match="20 texts are waiting") as refused:
                await engine.encode(["one more"], layer=-2)
            assert refused.value.retry_after_s == 1
            release()
            assert len(await waiting) == 20
        assert len(await engine.encode(["and now"], layer=-2)) == 1


async def test_a_request_goes_into_the_queue_whole_or_not_at_all(model: Watched) -> None:
    async with running(model) as engine, busy(engine, model):
        with pytest.raises(QueueFull):
            await engine.encode(["a cat"] * 21, layer=-2)
        assert engine.waiting == 0


async def test_cancelled_texts_are_dropped(model: Watched) -> None:
    async with running(model) as engine:
        async with busy(engine, model) as release:
            dropped = [asyncio.create_task(engine.encode(["drop me"], layer=-2)) for _ in range(5)]
            kept = asyncio.create_task(engine.encode(["keep me"], layer=-2))
            await eventually(lambda: engine.waiting == 6)
            for task in dropped:
                task.cancel()
            await asyncio.gather(*dropped, return_exceptions=True)
            release()
            assert len(await kept) == 1
        assert [len(batch) for batch in model.forwards] == [1, 1]


async def test_cancelled_texts_take_no_place_in_the_queue(model: Watched) -> None:
    async with running(model) as engine, busy(engine, model) as release:
        dropped = asyncio.create_task(engine.encode(["drop me"] * 20, layer=-2))
        await eventually(lambda: engine.waiting == 20)
        dropped.cancel()
        await asyncio.gather(dropped, return_exceptions=True)
        kept = asyncio.create_task(engine.encode(["keep me"], layer=-2))
        await eventually(lambda: kept.done() or engine.waiting == 1)
        release()
        assert len(await kept) == 1


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (RuntimeError("a library's own text"), InternalError, "could not be encoded"),
        (OutOfMemory("The device has too little free memory."), OutOfMemory, "too little free memory"),
    ],
)
async def test_a_batch_that_breaks_fails_alone(
    model: Watched, error: Exception, raised: type[Exception], text: str
) -> None:
    async with running(model) as engine:
        model.break_next = [error]
        with pytest.raises(raised, match=text) as failed:
            await engine.encode(["a cat", "a dog"], layer=-2)
        assert "library" not in str(failed.value)
        assert len(await engine.encode(["a cat"], layer=-2)) == 1
        assert engine.device.unready_reason() is None


async def late(engine: EncoderEngine, model: Watched) -> None:
    """Encodes a text for which there was a device when it came."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceThread, "model", model)
        async with asyncio.timeout(PATIENCE_S):
            await engine.encode(["a cat"], layer=-2)


async def test_a_device_that_is_lost_ends_the_process(model: Watched) -> None:
    """After a CUDA assert every later call fails: the service must say so and exit for its supervisor to restart it."""
    statuses: list[int] = []
    engine = EncoderEngine(lambda: model, LIMITS, WRITING, on_failure=statuses.append)
    engine.device.start()
    await eventually(lambda: engine.device.unready_reason() is None)
    async with busy(engine, model) as release:  # a text is being encoded, another one and a conversation wait
        model.break_next = [torch.AcceleratorError("CUDA error: device-side assert triggered")]
        waits = [asyncio.create_task(engine.encode([text], layer=-2)) for text in ("a cat", "a dog " * 40)]
        await eventually(lambda: engine.waiting == 2)
        release()
        async with asyncio.timeout(PATIENCE_S):
            ends = await asyncio.gather(*waits, return_exceptions=True)
    assert {type(end) for end in ends} <= {DeviceFailed, NotBegun}
    assert not any("CUDA" in str(end) for end in ends)
    with pytest.raises(NotBegun):  # of a text that was tokenized meanwhile: nothing would ever encode it
        await late(engine, model)
    try:
        await eventually(lambda: statuses)
        assert statuses == [EXIT_DEVICE_FAILED]
        assert engine.device.unready_reason() == "the device failed"
    finally:
        await engine.stop()


async def test_when_one_text_fails_the_others_of_its_request_are_given_up(model: Watched) -> None:
    """The long text never gets its turn; nothing may wait for it for ever."""
    async with running(model) as engine:
        async with busy(engine, model) as release:
            request = asyncio.create_task(engine.encode(["short", "long " * 200], layer=-2))
            await eventually(lambda: engine.waiting == 2)
            model.break_next = [RuntimeError("for the busy one"), RuntimeError("for the short text")]
            release()
            with pytest.raises(InternalError):
                await request
        await eventually(lambda: len(asyncio.all_tasks()) == 1)
        assert engine.waiting == 0


async def test_max_length_keeps_the_first_tokens(text_encoder: TextEncoder) -> None:
    async with running(text_encoder) as engine:
        (whole,) = await engine.encode(["a cat in the sun"], layer=-2)
        (cut,) = await engine.encode(["a cat in the sun"], layer=-2, max_length=3)
    assert (cut.tokens, cut.states.shape) == (3, (3, 64))
    torch.testing.assert_close(cut.states, whole.states[:3], rtol=1e-5, atol=1e-5)


async def test_texts_that_are_too_long_or_have_no_tokens(text_encoder: TextEncoder) -> None:
    async with running(text_encoder) as engine:
        with pytest.raises(InvalidField, match="the limit is 500"):
            await engine.encode(["a", "cat " * 2_000], layer=-2)
        (cut,) = await engine.encode(["cat " * 2_000], layer=-2, max_length=500)
        assert cut.tokens == 500
        with pytest.raises(InvalidField, match="no tokens"):
            await engine.encode([""], layer=-2)
        with pytest.raises(InvalidField, match="'hidden_layer'"):
            await engine.encode(["a cat"], layer=-5)
        assert engine.waiting == 0
        assert len(await engine.encode(["a cat"], layer=-4)) == 1


async def test_unready_before_the_model_is_loaded(text_encoder: TextEncoder) -> None:
    may_load = threading.Event()

    def load() -> TextEncoder:
        may_load.wait(PATIENCE_S)
        return text_encoder

    engine = EncoderEngine(load, LIMITS, WRITING)
    engine.device.start()
    with pytest.raises(Unready, match="being loaded"):
        await engine.encode(["a cat"], layer=-2)
    with pytest.raises(Unready):
        await engine.tokenize(["a cat"])
    with pytest.raises(Unready):
        _ = engine.facts
    may_load.set()
    await eventually(lambda: engine.device.unready_reason() is None)
    assert len(await engine.encode(["a cat"], layer=-2)) == 1
    await engine.stop()


async def test_stop_ends_the_running_batch_and_refuses_what_waits(model: Watched) -> None:
    async with running(model) as engine:
        model.gate.clear()
        runs = asyncio.create_task(engine.encode(["runs"], layer=-2))
        await eventually(model.entered.is_set)
        waits = asyncio.create_task(engine.encode(["waits"], layer=-1))
        await eventually(lambda: engine.waiting == 1)
        stopping = asyncio.create_task(engine.stop())
        await eventually(lambda: engine.device.stopping)
        model.gate.set()
        await stopping
        assert len(await runs) == 1
        with pytest.raises((QueueFull, Unready), match="stopping"):
            await waits
        with pytest.raises(Unready, match="stopping"):
            await engine.encode(["too late"], layer=-2)
