"""Pictures of many requests on one vision-language model, whose weights may leave between them. Knows no HTTP."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from services.vl.images import read_picture
from services.vl.jobs import DescribeJob, Description, Extraction, ExtractJob
from services.vl.model import Inputs, ModelFacts, VisionModel
from shared.device_thread import DeviceThread
from shared.errors import InternalError, QueueFull, ServiceError, Unready
from shared.jobs import Job
from shared.language.options import Sampling, drawn_seed
from shared.schemas.vl import DescribeParameters, ExtractParameters
from shared.tensors import DEVICE_ERROR

DECODED_AT_ONCE = 2  # each takes up to some hundred megabytes

T = TypeVar("T")
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the queue and of a picture with its text; see `VlSettings` for each."""

    max_waiting: int
    max_tokens: int


class VlEngine:
    """Takes pictures from many requests; they are read one after the other on the thread that owns the device.

    With `auto_unload` the weights are freed whenever nothing waits any more, and loaded again by the next picture.
    """

    def __init__(
        self,
        load: Callable[[], VisionModel],
        limits: Limits,
        *,
        auto_unload: bool,
        on_failure: Callable[[int], None] | None = None,
    ) -> None:
        self.auto_unload = auto_unload
        self._limits = limits
        self._extractions: list[ExtractJob] = []
        self._descriptions: list[DescribeJob] = []
        self._pictures = 0
        self._lock = threading.Lock()
        self._decoding = asyncio.Semaphore(DECODED_AT_ONCE)
        self.device = DeviceThread("vl", load=load, tick=self._tick, on_failure=on_failure)

    @property
    def facts(self) -> ModelFacts:
        """Of the model. Raises Unready."""
        return self.device.model.facts

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory. Raises Unready."""
        return self.device.model.loaded

    @property
    def waiting(self) -> int:
        """Pictures in the queue, those that are being decoded included."""
        return self._pictures

    async def extract(self, picture: bytes, parameters: ExtractParameters) -> Extraction:
        """Hidden states of a picture with its text. Raises a ServiceError."""
        self.device.model.check_layer(parameters.hidden_layer)
        async with self._place():
            job = ExtractJob(await self._inputs(picture, parameters.text or "", None), parameters)
            return await self._result(job, self._extractions)

    async def describe(self, picture: bytes, parameters: DescribeParameters) -> Description:
        """A text about a picture, by the model's own language head. Raises a ServiceError."""
        async with self._place():
            inputs = await self._inputs(picture, parameters.prompt, parameters.system_prompt)
            job = DescribeJob(inputs, parameters.max_tokens, _sampling(parameters))
            return await self._result(job, self._descriptions)

    def check_room(self) -> None:
        """Raises QueueFull when no further picture may wait, Unready when none can be read."""
        _ = self.device.model
        if self._pictures >= self._limits.max_waiting:
            raise QueueFull(f"{self._pictures} pictures wait already; try again soon.", retry_after_s=5)

    async def stop(self) -> None:
        """Ends the device's thread; what still waits is refused."""
        await self.device.stop()
        left: list[Job[Any]] = [*self._extractions, *self._descriptions]
        for job in left:
            job.fail(Unready("The service is stopping.", retry_after_s=5))

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """A place in the queue. Once nobody has one, the device's thread looks whether the weights may go."""
        self.check_room()
        self._pictures += 1
        try:
            yield
        finally:
            self._pictures -= 1
            self.device.wake()

    async def _inputs(self, picture: bytes, text: str, system_prompt: str | None) -> Inputs:
        """Decodes the picture and cuts it up in a thread, a few at a time."""
        model = self.device.model

        def read() -> Inputs:
            return model.prepare(read_picture(picture), text, system_prompt, max_tokens=self._limits.max_tokens)

        async with self._decoding:
            return await asyncio.to_thread(read)

    async def _result(self, job: Job[T], queue: list[Any]) -> T:
        with self._lock:
            queue.append(job)
        self.device.wake()
        try:
            return await job.result()
        finally:
            with self._lock:  # a picture that nobody waits for takes no place in the queue
                if job in queue:
                    queue.remove(job)

    def _tick(self, model: VisionModel) -> bool:
        """An extraction, and a token of the oldest description: neither waits for more than one of the other."""
        with self._lock:
            extraction = self._extractions.pop(0) if self._extractions else None
            description = self._descriptions[0] if self._descriptions else None
        if extraction is not None:
            _try(extraction, lambda: extraction.run(model))
        if description is not None and not description.ended:
            _try(description, lambda: description.advance(model))
        if extraction is not None or (description is not None and not description.ended):
            return True
        if self.auto_unload and not self._pictures:
            model.unload()
        return False


def _try(job: Job[T], work: Callable[[], None]) -> None:
    """Does the work unless nobody waits for it; what it raises becomes the job's error."""
    if job.cancelled:
        return
    try:
        work()
    except ServiceError as error:
        job.fail(error)
    except Exception as error:  # one bad picture must not end the service
        log.exception("a picture could not be read")
        job.fail(InternalError("The picture could not be read."))
        if isinstance(error, DEVICE_ERROR):
            raise  # after it every call of the device fails: only a new process helps


def _sampling(parameters: DescribeParameters) -> Sampling:
    return Sampling(
        seed=drawn_seed() if parameters.seed is None else parameters.seed,
        temperature=1.0 if parameters.temperature is None else parameters.temperature,
        top_p=0.95 if parameters.top_p is None else parameters.top_p,
        min_p=parameters.min_p or 0.0,
        top_k=parameters.top_k or 0,
        presence_penalty=parameters.presence_penalty or 0.0,
    )
