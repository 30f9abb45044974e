"""Batching of encodes: texts that wait together and are of about the same length share a forward. Knows no HTTP.

Chat completions are written on the same weights: between two batches all of them get one token.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import structlog

from services.encoder.model import ModelFacts, TextEncoder
from shared.device_thread import DeviceThread, device_failed, not_begun
from shared.errors import InternalError, InvalidField, QueueFull, ServiceError, Unready
from shared.jobs import Job
from shared.language.generations import Assignment, Generations, WritingLimits
from shared.language.options import Ending
from shared.tensors import DEVICE_ERROR, describe

QUICK_CHARS = 2_000  # texts up to this are tokenized in the event loop: quicker than a thread could be asked
SHORTEST = 16  # tokens; texts below it count as this long when lengths are compared
LENGTH_RATIO = 2.0  # texts share a forward when none is more than this many times as long as another

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The hidden states of one text: `states` is a CPU tensor [tokens, width] in the model's dtype."""

    states: Any
    tokens: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the queue and of a batch; see `EncoderSettings` for each."""

    max_batch_tokens: int
    max_batch_texts: int
    max_waiting: int
    max_tokens: int


class EncodeJob(Job[Encoded]):
    """One text that waits for its hidden states."""

    def __init__(self, ids: Sequence[int], layer: int) -> None:
        super().__init__()
        self.ids = ids
        self.layer = layer


class EncoderEngine:
    """Takes texts from many requests and runs them in batches on the thread that owns the device."""

    def __init__(
        self,
        load: Callable[[], TextEncoder],
        limits: Limits,
        writing: WritingLimits,
        *,
        on_failure: Callable[[int], None] | None = None,
    ) -> None:
        self.limits = limits
        self._waiting: list[EncodeJob] = []
        self._refused: ServiceError | None = None
        self._lock = threading.Lock()
        self.device = DeviceThread("encoder", load=load, tick=self._tick, on_loss=self._lose_all, on_failure=on_failure)
        self.generations = Generations(writing, wake=self.device.wake)

    @property
    def facts(self) -> ModelFacts:
        """Of the loaded model. Raises Unready."""
        return self.device.model.facts

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return len(self._waiting)

    async def tokenize(self, texts: Sequence[str], *, max_length: int | None = None) -> list[list[int]]:
        """Token ids of each text, at most `max_length`. Raises Unready, InvalidField."""
        model = self.device.model
        if sum(map(len, texts)) <= QUICK_CHARS:
            token_ids = model.tokenize(texts)
        else:
            token_ids = await asyncio.to_thread(model.tokenize, texts)
        token_ids = [ids[:max_length] for ids in token_ids]
        longest = max(len(ids) for ids in token_ids)
        if longest > self.limits.max_tokens:
            raise InvalidField(f"A text has {longest} tokens, the limit is {self.limits.max_tokens}.")
        return token_ids

    async def encode(self, texts: Sequence[str], *, layer: int, max_length: int | None = None) -> list[Encoded]:
        """Hidden states `layer` of each text, at most `max_length` tokens each.

        Raises Unready, InvalidField, QueueFull.
        """
        self.device.model.check_layer(layer)
        jobs = [EncodeJob(ids, layer) for ids in await self.tokenize(texts, max_length=max_length)]
        if not all(job.ids for job in jobs):
            raise InvalidField("A text has no tokens.")
        with self._lock:
            if self._refused is not None:
                raise self._refused
            if len(self._waiting) + len(jobs) > self.limits.max_waiting:
                raise QueueFull(f"{len(self._waiting)} texts are waiting already; try again soon.", retry_after_s=1)
            self._waiting.extend(jobs)
        self.device.wake()
        try:
            return await asyncio.gather(*(job.result() for job in jobs))
        finally:
            for job in jobs:
                job.cancel()
            with self._lock:  # a text that nobody waits for takes no place in the queue
                self._waiting = [job for job in self._waiting if not job.cancelled]

    async def write(self, assignment: Assignment) -> AsyncGenerator[str | Ending]:
        """Continues a conversation: the text as it comes, then how it ended. Left early, it is given up.

        Raises Unready, InvalidField, QueueFull, NumericalError, OutOfMemory.
        """
        async with aclosing(self.generations.write(self.device.model.language, assignment)) as pieces:
            async for piece in pieces:
                yield piece

    async def stop(self) -> None:
        """Ends the device's thread; what still waits or is being written is refused."""
        await self.device.stop()
        stopping = Unready("The service is stopping.", retry_after_s=5)
        self.generations.refuse_all(stopping, stopping)
        self._refuse_waiting(stopping)

    def _lose_all(self) -> None:
        self.generations.refuse_all(device_failed(), not_begun())
        self._refuse_waiting(not_begun())

    def _refuse_waiting(self, error: ServiceError) -> None:
        """Ends all that waits; what is still to come is refused at once, as no tick runs any more."""
        with self._lock:
            self._refused = error
            left, self._waiting = self._waiting, []
        _fail_all(left, error)

    def _tick(self, model: TextEncoder) -> bool:
        """A batch, and a token of every text that is being written: neither waits for more than one of the other."""
        encoded = self._encode_batch(model)
        return bool(self.generations.busy and self.generations.tick(model.language)) or encoded

    def _encode_batch(self, model: TextEncoder) -> bool:
        with self._lock:
            self._waiting = [job for job in self._waiting if not job.cancelled]
            batch = choose_batch(self._waiting, self.limits)
            chosen = set(batch)
            self._waiting = [job for job in self._waiting if job not in chosen]
        if not batch:
            return False
        try:
            states = model.hidden_states([job.ids for job in batch], batch[0].layer)
        except ServiceError as error:
            _fail_all(batch, error)
        except DEVICE_ERROR:
            _fail_all(batch, device_failed())
            raise  # after it every call of the device fails: only a new process helps
        except Exception:  # one bad batch must not end the service
            log.exception("a batch could not be encoded", texts=len(batch))
            _fail_all(batch, InternalError("The text could not be encoded."))
        else:
            for job, item in zip(batch, states, strict=True):
                if log.is_enabled_for(logging.DEBUG):
                    log.debug(
                        "encoded", tokens=len(job.ids), first_20_ids=job.ids[:20], layer=job.layer, **describe(item)
                    )
                job.resolve(Encoded(item, len(job.ids)))
        return True


def choose_batch(waiting: Sequence[EncodeJob], limits: Limits) -> list[EncodeJob]:
    """The jobs of the next forward: the oldest, and those of its layer that are nearest to it in length.

    Padding is bounded by `LENGTH_RATIO`, the padded size by `max_batch_tokens`; the oldest always goes, however long.
    """
    if not waiting:
        return []
    oldest = waiting[0]
    candidates = sorted(
        (job for job in waiting[1:] if job.layer == oldest.layer),
        key=lambda job: (abs(len(job.ids) - len(oldest.ids)), job.number),
    )
    batch = [oldest]
    shortest = longest = _length(oldest)
    for job in candidates:
        low, high = min(shortest, _length(job)), max(longest, _length(job))
        if len(batch) >= limits.max_batch_texts or high > LENGTH_RATIO * low:
            break
        if high * (len(batch) + 1) > limits.max_batch_tokens:
            continue
        batch.append(job)
        shortest, longest = low, high
    return batch


def _length(job: EncodeJob) -> int:
    return max(len(job.ids), SHORTEST)


def _fail_all(jobs: Iterable[EncodeJob], error: ServiceError) -> None:
    for job in jobs:
        job.fail(error)
