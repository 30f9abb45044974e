"""The order of work on the device: a bounded queue, one thread, one denoising step at a time. Knows no HTTP.

Today a picture is finished before the next begins. The thread only ever calls `model.start`, `model.step` with a list
of pictures and `model.decode`, so a scheduler of steps over many pictures replaces `_tick` and nothing else.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import structlog

from services.diffusion.model import DEVICE_ERROR, Denoising, ModelFacts, ZImageModel
from services.diffusion.png import encode_png, encode_thumbnail
from shared.device_thread import DeviceThread
from shared.errors import ClientGone, InternalError, QueueFull, ServiceError, Unready
from shared.jobs import Job
from shared.schemas.diffusion import NEGATIVE, TEXT, DiffusionParameters
from shared.tensors import describe
from shared.wire import Header

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PictureRequest:
    """What to draw: `message` is the safetensors body with the embeddings that `header` names."""

    parameters: DiffusionParameters
    message: bytearray
    header: Header
    request_id: str | None = None

    @property
    def guided(self) -> bool:
        """Guidance is asked for, so the negative embeddings are used."""
        return self.parameters.guidance_scale > 0


@dataclass(slots=True)
class Timings:
    """Seconds that a picture spent in each stage."""

    queue: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    png: float = 0.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pixels as a numpy array uint8 [height, width, 3]."""

    pixels: Any


class PictureJob(Job[Drawn]):
    """A picture that waits or is being made; `step` counts the steps that are done."""

    def __init__(self, request: PictureRequest) -> None:
        super().__init__()
        self.request = request
        self.timings = Timings()
        self.step = 0


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture and what it took."""

    png: bytes
    thumbnail: bytes
    timings: Timings = field(default_factory=Timings)


class DiffusionEngine:
    """Takes pictures from many requests and makes them on the thread that owns the device."""

    def __init__(
        self,
        load: Callable[[], ZImageModel],
        *,
        max_waiting: int,
        png_compression: int,
        on_failure: Callable[[int], None] | None = None,
    ) -> None:
        self.max_waiting = max_waiting
        self._png_compression = png_compression
        self._waiting: deque[PictureJob] = deque()
        self._running: list[PictureJob] = []
        self._lock = threading.Lock()
        self._encoders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="png")
        self.device = DeviceThread("diffusion", load=load, tick=self._tick, on_failure=on_failure)

    @property
    def facts(self) -> ModelFacts:
        """Of the loaded model. Raises Unready."""
        return self.device.model.facts

    @property
    def waiting(self) -> int:
        """Pictures in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> list[PictureJob]:
        """Pictures in the making."""
        return list(self._running)

    def check_room(self) -> None:
        """Raises QueueFull when no further picture may wait, Unready when none can be made."""
        _ = self.device.model
        if len(self._waiting) >= self.max_waiting:
            raise QueueFull(f"{len(self._waiting)} pictures are waiting already; try again soon.", retry_after_s=5)

    async def generate(self, request: PictureRequest) -> Picture:
        """Makes a picture. Raises QueueFull, Unready, InvalidField, OutOfMemory, NumericalError.

        When the caller is cancelled, so is the picture: at once while it waits, at the next step while it is made.
        """
        job = PictureJob(request)
        with self._lock:
            self.check_room()
            self._waiting.append(job)
        self.device.wake()
        try:
            drawn = await job.result()
        except asyncio.CancelledError:
            with self._lock, suppress(ValueError):  # a picture that nobody waits for takes no place in the queue
                self._waiting.remove(job)
            raise
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        png, thumbnail = await loop.run_in_executor(self._encoders, self._encode, drawn)
        job.timings.png = time.perf_counter() - started
        return Picture(png, thumbnail, job.timings)

    async def stop(self) -> None:
        """Ends the device's thread after the running step; what waits or runs is refused."""
        await self.device.stop()
        with self._lock:
            left = [*self._waiting, *self._running]
            self._waiting.clear()
        for job in left:
            job.fail(Unready("The service is stopping.", retry_after_s=5))
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def _encode(self, drawn: Drawn) -> tuple[bytes, bytes]:
        return encode_png(drawn.pixels, compression=self._png_compression), encode_thumbnail(drawn.pixels)

    def _tick(self, model: ZImageModel) -> bool:
        """Makes one picture, or drops one that nobody waits for any more."""
        with self._lock:
            if not self._waiting:
                return False
            job = self._waiting.popleft()
            self._running.append(job)
        job.timings.queue = time.monotonic() - job.created_at
        try:
            job.resolve(Drawn(self._draw(model, job)))
        except ClientGone:
            log.info("picture cancelled", request_id=job.request.request_id, step=job.step)
        except ServiceError as error:
            job.fail(error)
        except Exception as error:  # one bad picture must not end the service
            log.exception("a picture failed", request_id=job.request.request_id, step=job.step)
            job.fail(InternalError("The picture could not be made; the server's log has the cause."))
            if isinstance(error, DEVICE_ERROR):
                raise  # after it every call of the device fails: only a new process helps
        finally:
            self._running.remove(job)
        return True

    def _draw(self, model: ZImageModel, job: PictureJob) -> Any:
        started = time.perf_counter()
        picture = self._start(model, job)
        while not picture.finished:
            if job.cancelled:
                raise ClientGone("Nobody waits for this picture any more.")
            if self.device.stopping:
                raise Unready("The service is stopping.", retry_after_s=5)
            model.step([picture])
            job.step = picture.step
        job.timings.denoise = time.perf_counter() - started
        started = time.perf_counter()
        pixels = model.decode(picture)
        job.timings.decode = time.perf_counter() - started
        return pixels

    def _start(self, model: ZImageModel, job: PictureJob) -> Denoising:
        request = job.request
        text = model.read_embeddings(request.message, request.header, TEXT)
        negative = model.read_embeddings(request.message, request.header, NEGATIVE) if request.guided else None
        if log.is_enabled_for(logging.DEBUG):
            log.debug("embeddings arrived", request_id=request.request_id, **describe(text))
        return model.start(request.parameters, text, negative)
