"""Pictures of many requests on one device: what may be asked for, how it is awaited, and how it is given up.

Knows no HTTP. `stepping` makes the pictures, on the one thread that owns the device.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass

from services.diffusion.jobs import Drawn, News, Picture, PictureJob, PictureRequest, Sketch, StepDone, Waits
from services.diffusion.model import ZImageModel
from services.diffusion.order import Limits
from services.diffusion.parts import ModelFacts
from services.diffusion.png import encode_png, encode_preview, encode_thumbnail
from services.diffusion.shapes import Lora, Shape, ShelfLora, shape_of
from services.diffusion.stepping import StepScheduler
from shared.device_thread import DeviceThread, device_failed, not_begun
from shared.errors import Cancelled, InvalidField, NotBegun, UnknownName, Unready, UpstreamTimeout
from shared.schemas.diffusion import NEGATIVE, TEXT


@dataclass(frozen=True, slots=True)
class PreviewReady:
    """A preview after `step` steps, as a JPEG."""

    step: int
    jpeg: bytes


Told = Waits | StepDone | PreviewReady | Picture


class DiffusionEngine:
    """Takes pictures from many requests and has them made on the thread that owns the device."""

    def __init__(
        self,
        load: Callable[[], ZImageModel],
        limits: Limits,
        *,
        max_waiting: int,
        png_compression: int,
        memory_bytes: int | None = None,
        on_failure: Callable[[int], None] | None = None,
    ) -> None:
        self.pictures = StepScheduler(limits, max_waiting=max_waiting, memory_bytes=memory_bytes)
        self._memory_bytes = memory_bytes
        self._png_compression = png_compression
        self._helpers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="helper")
        self.device = DeviceThread(
            "diffusion", load=load, tick=self.pictures.tick, on_loss=self._refuse, on_failure=on_failure
        )

    @property
    def facts(self) -> ModelFacts:
        """Of the loaded model. Raises Unready."""
        return self.device.model.facts

    def check_room(self) -> None:
        """Raises QueueFull when no further picture may wait, Unready when none can be made."""
        _ = self.device.model
        self.pictures.check_room()

    async def generate(self, request: PictureRequest, *, watched: bool = False) -> AsyncGenerator[Told]:
        """Makes a picture, which comes last; with `watched` it is told before what happens to it.

        When the generator is closed the picture is given up: at once while it waits, at the next step while it is
        made. Raises QueueFull, Unready, InvalidField, UnknownName, UpstreamTimeout, Cancelled, OutOfMemory,
        NumericalError, DeviceFailed, NotBegun.
        """
        model = self.device.model
        shape = _shape_of(model.facts, request, await self._loras_of(model, request))
        self._check_size(model, shape)
        job = PictureJob(request, shape, watched=watched)
        self.pictures.add(job)
        self.device.wake()
        deadline = self._end_in_time(job)
        try:
            async with aclosing(job.news()) as news:
                async for item in news:
                    yield await self._told(item)
            drawn = await job.result()
        finally:
            deadline.cancel()
            job.cancel()
            self.pictures.drop(job)
        yield await self._encoded(job, drawn)

    def cancel(self, request_id: str) -> None:
        """Gives up every picture of that request. Raises UnknownName when there is none."""
        jobs = [job for job in (*self.pictures.waiting, *self.pictures.running) if job.request.request_id == request_id]
        if not jobs:
            raise UnknownName("No picture of that id waits or is being made.")
        for job in jobs:
            self.pictures.drop(job)
            job.fail(Cancelled("The picture was cancelled."))

    async def loras(self) -> tuple[list[ShelfLora], Mapping[str, float]]:
        """The LoRAs that requests may name, and names and scales for a picture that names none. Raises Unready."""
        shelf = self.device.model.adapters.shelf
        await asyncio.get_running_loop().run_in_executor(self._helpers, shelf.refresh)
        return list(shelf.files.values()), shelf.default

    async def stop(self) -> None:
        """Ends the device's thread after the running step; what waits or runs is refused."""
        await self.device.stop()
        self.pictures.refuse_all(
            Unready("The service is stopping.", retry_after_s=5),
            NotBegun("The service is stopping; it had not begun this picture.", retry_after_s=5),
        )
        self._helpers.shutdown(wait=False, cancel_futures=True)

    def _refuse(self) -> None:
        self.pictures.refuse_all(device_failed(), not_begun())

    async def _loras_of(self, model: ZImageModel, request: PictureRequest) -> tuple[Lora, ...]:
        """The LoRAs that are asked for. Files are looked at in a thread."""
        choices = request.parameters.loras
        if not choices and not model.adapters.shelf.default:
            return model.adapters.choose(choices)
        return await asyncio.get_running_loop().run_in_executor(self._helpers, model.adapters.choose, choices)

    def _check_size(self, model: ZImageModel, shape: Shape) -> None:
        """Raises InvalidField for a picture that this device could not make even if it had nothing else to do, and
        decoded it in tiles."""
        room = model.capacity_bytes if self._memory_bytes is None else self._memory_bytes
        if room is None:
            return
        room -= model.adapters.bytes_of(name for name, _ in shape.loras)
        if model.footprint.least(shape) <= room:
            return
        most = model.footprint.most_pixels(shape, room)
        raise InvalidField(
            f"'width' times 'height' must be at most {most} pixels on this device, not {shape.pixels}: it has "
            f"{room / 1e9:.3g} GB of memory for the work."
        )

    def _end_in_time(self, job: PictureJob) -> asyncio.TimerHandle:
        timeout_s = job.request.parameters.timeout_s

        def expire() -> None:
            self.pictures.drop(job)
            job.fail(UpstreamTimeout(f"The picture was not ready within {timeout_s:g} s."))

        loop = asyncio.get_running_loop()
        handle = loop.call_later(timeout_s or 0.0, expire)
        if timeout_s is None:
            handle.cancel()
        return handle

    async def _told(self, news: News) -> Waits | StepDone | PreviewReady:
        if not isinstance(news, Sketch):
            return news
        loop = asyncio.get_running_loop()
        return PreviewReady(news.step, await loop.run_in_executor(self._helpers, encode_preview, news.pixels))

    async def _encoded(self, job: PictureJob, drawn: Drawn) -> Picture:
        loop = asyncio.get_running_loop()
        started = loop.time()
        png, thumbnail = await loop.run_in_executor(self._helpers, self._encode, drawn)
        job.timings.png = loop.time() - started
        return Picture(png, thumbnail, job.timings)

    def _encode(self, drawn: Drawn) -> tuple[bytes, bytes]:
        return encode_png(drawn.pixels, compression=self._png_compression), encode_thumbnail(drawn.pixels)


def _shape_of(facts: ModelFacts, request: PictureRequest, loras: tuple[Lora, ...]) -> Shape:
    """The shape of the picture's first step, known before its embeddings are read."""

    def tokens(name: str) -> int:
        meta = request.header.tensor(name)
        return 0 if meta is None else min(meta.shape[0], facts.text_limit)

    negative = tokens(NEGATIVE) if request.guided else None
    return shape_of(request.parameters, text=tokens(TEXT), negative=negative, loras=loras)
