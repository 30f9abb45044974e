"""`Generations` on a device's thread: texts of many requests, the queue's bounds, giving up, failures and the end."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
import structlog
import torch
from inprocess import eventually
from language import PROMPTS, generate, prompt_ids

from shared.device_thread import EXIT_DEVICE_FAILED, DeviceThread, device_failed, not_begun
from shared.errors import (
    DeviceFailed,
    InternalError,
    InvalidField,
    NotBegun,
    NumericalError,
    OutOfMemory,
    QueueFull,
    ServiceError,
    Unready,
)
from shared.language.batch import Batch
from shared.language.generations import Assignment, Generations, WritingLimits
from shared.language.model import LanguageModel
from shared.language.options import Ending, Message, Sampling
from shared.language.sampling import BROKEN

PATIENCE_S = 30.0
LIMITS = WritingLimits(max_running=8, max_waiting=8, max_cache_tokens=8_192)


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


class Gate:
    """Holds the batch's work back until it is opened, counts it, and can make it break."""

    def __init__(self, batch: Batch) -> None:
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.works = 0
        self.break_next: list[Exception] = []
        self.instead: list[Any] = []
        self._advance = batch.advance

    def advance(self) -> Any:
        """In the batch's place."""
        self.entered.set()
        assert self.open.wait(PATIENCE_S)
        self.works += 1
        if self.break_next:
            raise self.break_next.pop(0)
        came = self._advance()
        return self.instead.pop(0)(came) if self.instead else came


@pytest.fixture
def gate(language: LanguageModel) -> Iterator[Gate]:
    batch: Any = language.batch
    gate = Gate(batch)
    batch.advance = gate.advance
    yield gate
    gate.open.set()
    del batch.advance


@asynccontextmanager
async def running(
    language: LanguageModel, limits: WritingLimits = LIMITS, on_failure: Callable[[int], None] | None = None
) -> AsyncIterator[Generations]:
    def tick(model: LanguageModel) -> bool:
        return generations.tick(model)

    def lose_all() -> None:
        generations.refuse_all(device_failed(), not_begun())

    device: DeviceThread[LanguageModel] = DeviceThread(
        "test", load=lambda: language, tick=tick, on_loss=lose_all, on_failure=on_failure
    )
    generations = Generations(limits, wake=device.wake)
    device.start()
    await eventually(lambda: device.unready_reason() is None)
    try:
        yield generations
    finally:
        await device.stop()
        stopping = Unready("The service is stopping.")
        generations.refuse_all(stopping, stopping)


def assignment(prompt: str = "A cat", *, max_tokens: int | None = 12, **fields: Any) -> Assignment:
    sampling = fields.pop("sampling", Sampling(seed=0, temperature=0.0))
    return Assignment(messages=[Message("user", prompt)], max_tokens=max_tokens, sampling=sampling, **fields)


async def whole(generations: Generations, language: LanguageModel, wanted: Assignment) -> tuple[str, Ending]:
    *pieces, ending = [piece async for piece in generations.write(language, wanted)]
    assert isinstance(ending, Ending)
    assert all(pieces), "no piece is empty"
    return "".join(map(str, pieces)), ending


async def test_texts_of_many_requests(language: LanguageModel, gate: Gate) -> None:
    """Each is what `generate` writes, though they share forwards."""
    async with running(language) as generations:
        written = await asyncio.gather(*(whole(generations, language, assignment(prompt)) for prompt in PROMPTS))
    for prompt, (text, ending) in zip(PROMPTS, written, strict=True):
        ids = prompt_ids(language, prompt)
        tokens = generate(language, ids, 12)
        ended = tokens[-1] in language.facts.ends
        assert text == language._tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
        assert ending == Ending("stop" if ended else "length", len(ids), len(tokens))
    assert gate.works < 8 * 12, "they did not share forwards"


async def test_a_text_ends_with_the_models_turn(language: LanguageModel, gate: Gate) -> None:
    end = min(language.facts.ends)
    gate.instead = [lambda came: came] * 3 + [lambda came: [(row, end) for row, _ in came]]
    async with running(language) as generations:
        text, ending = await whole(generations, language, assignment(max_tokens=50))
        assert ending.reason == "stop"
        assert ending.written_tokens == 4
        assert "<|" not in text
        assert generations.busy is False


async def test_a_think_block_that_the_template_opens_is_told(
    language: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all of a text that is cut off while the model still thinks would count as its answer."""
    tokenizer = language._tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", f"{tokenizer.chat_template}{{{{ '<think>\n' }}}}")
    async with running(language) as generations:
        text, ending = await whole(generations, language, assignment())
    assert text.startswith("<think>\n")
    assert "<think>" not in text.removeprefix("<think>\n")
    assert ending.reason == "length"


async def test_a_stop_string_ends_it(language: LanguageModel) -> None:
    async with running(language) as generations:
        sampling = Sampling(seed=4)
        text, _ = await whole(generations, language, assignment(max_tokens=40, sampling=sampling))
        stop = text[10:13]
        cut, ending = await whole(generations, language, assignment(max_tokens=40, sampling=sampling, stop=[stop]))
    assert cut == text[: text.index(stop)]
    assert ending.reason == "stop"


async def test_who_leaves_frees_the_device_at_the_next_token(language: LanguageModel, gate: Gate) -> None:
    async with running(language) as generations:
        async with aclosing(generations.write(language, assignment(max_tokens=4_000))) as pieces:
            await anext(pieces)
            gate.entered.clear()
            gate.open.clear()
            await eventually(gate.entered.is_set)
        works = gate.works
        gate.open.set()
        await eventually(lambda: not generations.running)
        assert gate.works <= works + 1


async def test_a_cancelled_wait_ends_the_text(language: LanguageModel, gate: Gate) -> None:
    async with running(language) as generations:
        gate.open.clear()
        task = asyncio.create_task(whole(generations, language, assignment(max_tokens=4_000)))
        await eventually(gate.entered.is_set)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gate.open.set()
        await eventually(lambda: not generations.running)
        assert (await whole(generations, language, assignment()))[1].written_tokens == 12


async def test_a_full_queue_refuses_and_who_gives_up_takes_no_place(language: LanguageModel, gate: Gate) -> None:
    limits = WritingLimits(max_running=1, max_waiting=2, max_cache_tokens=8_192)
    async with running(language, limits) as generations:
        gate.open.clear()
        first = asyncio.create_task(whole(generations, language, assignment()))
        await eventually(gate.entered.is_set)
        waiting = [asyncio.create_task(whole(generations, language, assignment())) for _ in range(2)]
        await eventually(lambda: generations.waiting == 2)
        with pytest.raises(QueueFull, match="2 texts wait") as refused:
            await whole(generations, language, assignment())
        assert refused.value.retry_after_s
        waiting[0].cancel()
        await eventually(lambda: generations.waiting == 1)
        again = asyncio.create_task(whole(generations, language, assignment()))
        await eventually(lambda: generations.waiting == 2)
        gate.open.set()
        assert len({(await task)[0] for task in (first, waiting[1], again)}) == 1


@pytest.mark.slow
async def test_texts_wait_until_the_cache_has_room(language: LanguageModel, gate: Gate) -> None:
    limits = WritingLimits(max_running=8, max_waiting=8, max_cache_tokens=1_100)
    async with running(language, limits) as generations:
        gate.open.clear()
        tasks = [asyncio.create_task(whole(generations, language, assignment(max_tokens=500))) for _ in range(4)]
        await eventually(gate.entered.is_set)
        await eventually(lambda: generations.waiting + generations.running == 4)
        gate.open.set()
        await eventually(lambda: generations.running == 2)
        seen = 0
        while not all(task.done() for task in tasks):
            seen = max(seen, generations.running)
            await asyncio.sleep(0.005)
        assert seen == 2
        assert len({task.result()[0] for task in tasks}) == 1


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (assignment("A cat", max_tokens=8_190), "together they may be at most 8192"),
        (assignment("cat " * 10_000, max_tokens=None), "together they may be at most 8192"),
    ],
)
async def test_what_can_never_fit_is_refused(language: LanguageModel, wanted: Assignment, text: str) -> None:
    async with running(language) as generations:
        with pytest.raises(InvalidField, match=text):
            await whole(generations, language, wanted)
        assert generations.waiting == 0


async def test_without_a_limit_it_takes_the_default_or_what_there_is_room_for(language: LanguageModel) -> None:
    async with running(language) as generations:
        _, ending = await whole(generations, language, assignment(max_tokens=None, default_tokens=7))
        assert ending.written_tokens == 7
    async with running(language, WritingLimits(max_running=1, max_waiting=1, max_cache_tokens=30)) as generations:
        _, ending = await whole(generations, language, assignment(max_tokens=None))
        assert ending.prompt_tokens + ending.written_tokens == 30


@pytest.mark.parametrize(
    ("error", "raised"),
    [(RuntimeError("a library's own text"), InternalError), (OutOfMemory("Too little memory."), OutOfMemory)],
)
async def test_a_failure_ends_the_texts_and_not_the_service(
    language: LanguageModel, gate: Gate, error: Exception, raised: type[ServiceError]
) -> None:
    async with running(language) as generations:
        gate.break_next = [error]
        failed = await asyncio.gather(
            *(whole(generations, language, assignment()) for _ in range(2)), return_exceptions=True
        )
        assert isinstance(failed[0], raised)
        assert "library" not in str(failed[0])
        assert (await whole(generations, language, assignment()))[1].written_tokens == 12


async def test_a_device_that_is_lost_ends_the_process(language: LanguageModel, gate: Gate) -> None:
    """Those who wait are told at once, not only when the process has stopped."""
    statuses: list[int] = []
    limits = WritingLimits(max_running=1, max_waiting=4, max_cache_tokens=8_192)
    async with running(language, limits, on_failure=statuses.append) as generations:
        gate.open.clear()
        tasks = [asyncio.create_task(whole(generations, language, assignment())) for _ in range(3)]
        await eventually(lambda: generations.waiting == 2)
        gate.break_next = [torch.AcceleratorError("CUDA error: device-side assert triggered")]
        gate.open.set()
        async with asyncio.timeout(PATIENCE_S):
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [DeviceFailed, NotBegun, NotBegun]
        await eventually(lambda: statuses)
        with pytest.raises(NotBegun):  # of a conversation that was tokenized meanwhile: nothing would ever go on
            async with asyncio.timeout(PATIENCE_S):
                await whole(generations, language, assignment())
    assert statuses == [EXIT_DEVICE_FAILED]


async def test_scores_that_are_no_numbers(language: LanguageModel, gate: Gate) -> None:
    gate.instead = [lambda came: [(row, BROKEN) for row, _ in came]]
    async with running(language) as generations:
        with pytest.raises(NumericalError):
            await whole(generations, language, assignment())
        assert (await whole(generations, language, assignment()))[1].written_tokens == 12


async def test_stopping_refuses_what_waits_and_what_runs(language: LanguageModel, gate: Gate) -> None:
    limits = WritingLimits(max_running=1, max_waiting=4, max_cache_tokens=8_192)
    async with running(language, limits) as generations:
        gate.open.clear()
        tasks = [asyncio.create_task(whole(generations, language, assignment(max_tokens=4_000))) for _ in range(3)]
        await eventually(lambda: generations.waiting == 2)
        asyncio.get_running_loop().call_later(0.05, gate.open.set)
    for task in tasks:
        with pytest.raises(Unready, match="stopping"):
            await task


async def test_a_long_conversation_is_tokenized_beside_the_loop(language: LanguageModel) -> None:
    async with running(language) as generations:
        _, ending = await whole(generations, language, assignment("cat " * 1_000, max_tokens=1))
    assert ending.prompt_tokens > 1_000
