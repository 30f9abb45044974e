"""Pictures of many requests on one vision-language model, whose weights may leave between them. Knows no HTTP."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from services.vl.images import read_picture
from services.vl.jobs import DescribeJob, Extraction, ExtractJob
from services.vl.model import Inputs, ModelFacts, VisionModel
from shared.checkpoint import UnusableModel
from shared.device_thread import DeviceThread, device_failed, not_begun
from shared.errors import InternalError, QueueFull, ServiceError, Unready
from shared.jobs import Job
from shared.language.defaults import WritingSettings
from shared.language.options import Ending, drawn_seed
from shared.language.thinking import Piece, ThinkParser
from shared.schemas.rewriter import Rewritten
from shared.schemas.vl import DescribeParameters, ExtractParameters
from shared.tensors import DEVICE_ERROR

DECODED_AT_ONCE = 2  # each takes up to some hundred megabytes

T = TypeVar("T")
J = TypeVar("J", ExtractJob, DescribeJob)
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
        writing: WritingSettings,
        *,
        auto_unload: bool,
        on_failure: Callable[[int], None] | None = None,
    ) -> None:
        self.auto_unload = auto_unload
        self._limits = limits
        self._writing = writing
        self._extractions: list[ExtractJob] = []
        self._descriptions: list[DescribeJob] = []
        self._refused: ServiceError | None = None
        self._pictures = 0
        self._lock = threading.Lock()
        self._decoding = asyncio.Semaphore(DECODED_AT_ONCE)
        self.device = DeviceThread("vl", load=load, tick=self._tick, on_loss=self._lose_all, on_failure=on_failure)

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
            with self._queued(job, self._extractions):
                return await job.result()

    async def describe(self, picture: bytes, parameters: DescribeParameters) -> AsyncGenerator[Piece | Rewritten]:
        """Pieces of a text about a picture, by the model's own language head, then the whole. Closing the generator
        ends the text. Raises a ServiceError."""
        async with self._place():
            opening = self.facts.openings[self._writing.enable_thinking(parameters)]
            inputs = await self._inputs(picture, parameters.prompt, parameters.system_prompt, opening)
            seed = drawn_seed() if parameters.seed is None else parameters.seed
            sampling = self._writing.sampling(parameters, seed)
            job = DescribeJob(inputs, self._writing.max_tokens(parameters), sampling)
            parser, reason = ThinkParser(), None
            parser.feed(opening)
            with self._queued(job, self._descriptions):
                async for written in job.pieces():
                    if isinstance(written, Ending):
                        reason = written.reason
                        continue
                    for piece in parser.feed(written):
                        yield piece
            for piece in parser.end():
                yield piece
            yield Rewritten(
                rewritten_prompt=parser.answer.text,
                thinking_content=parser.answer.thinking or None,
                backend="local",
                finish_reason=reason,
                seed=seed,
            )

    def check_room(self) -> None:
        """Raises QueueFull when no further picture may wait, Unready when none can be read."""
        _ = self.device.model
        if self._pictures >= self._limits.max_waiting:
            raise QueueFull(f"{self._pictures} pictures wait already; try again soon.", retry_after_s=5)

    async def stop(self) -> None:
        """Ends the device's thread; what still waits is refused."""
        await self.device.stop()
        stopping = Unready("The service is stopping.", retry_after_s=5)
        self._refuse_all(stopping, stopping)

    def _lose_all(self) -> None:
        self._refuse_all(not_begun(), device_failed())

    def _refuse_all(self, extractions: ServiceError, descriptions: ServiceError) -> None:
        """Ends all that waits; what is still to come is refused at once, as no tick runs any more."""
        with self._lock:
            self._refused = extractions
            jobs: list[tuple[Job[Any], ServiceError]] = [
                *((job, extractions) for job in self._extractions),
                *((job, descriptions) for job in self._descriptions),
            ]
        for job, error in jobs:
            job.fail(error)

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

    async def _inputs(self, picture: bytes, text: str, system_prompt: str | None, opening: str = "") -> Inputs:
        """Decodes the picture and cuts it up in a thread, a few at a time."""
        model, most = self.device.model, self._limits.max_tokens

        def read() -> Inputs:
            return model.prepare(read_picture(picture), text, system_prompt, opening=opening, max_tokens=most)

        await self._decoding.acquire()
        reading = asyncio.ensure_future(asyncio.to_thread(read))
        reading.add_done_callback(self._decoded)
        return await asyncio.shield(reading)  # a thread goes on when its client leaves, and is one of the few till then

    def _decoded(self, reading: "asyncio.Future[Inputs]") -> None:
        self._decoding.release()
        if not reading.cancelled():
            reading.exception()  # which nobody else asks for where the client has left

    @contextmanager
    def _queued(self, job: J, queue: list[J]) -> Iterator[None]:
        """The job's place in its queue: one that nobody waits for takes none."""
        with self._lock:
            if self._refused is not None:
                raise self._refused
            queue.append(job)
        self.device.wake()
        try:
            yield
        finally:
            job.cancel()
            with self._lock:
                if job in queue:
                    queue.remove(job)

    def _tick(self, model: VisionModel) -> bool:
        """An extraction, and a token of the oldest description: neither waits for more than one of the other."""
        with self._lock:
            extraction = self._extractions.pop(0) if self._extractions else None
            description = next((job for job in self._descriptions if not (job.ended or job.cancelled)), None)
        if extraction is not None:
            _try(extraction, lambda: extraction.run(model))
        if description is not None:
            _try(description, lambda: description.advance(model))
        if extraction is not None or description is not None:
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
    except UnusableModel as error:  # of weights that come and go
        log.error("the vision-language model cannot be used", reason=str(error))  # noqa: TRY400 - the sentence says it
        job.fail(Unready("Not ready: the vision-language model's files are not as they were at the start."))
    except DEVICE_ERROR:
        job.fail(device_failed())
        raise  # after it every call of the device fails: only a new process helps
    except Exception:  # one bad picture must not end the service
        log.exception("a picture could not be read")
        job.fail(InternalError("The picture could not be read."))
