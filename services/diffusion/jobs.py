"""A picture on its way through the engine: what is asked for, what is told of it meanwhile, what comes of it."""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from services.diffusion.denoising import Denoising
from services.diffusion.shapes import Shape
from shared.jobs import Job
from shared.schemas.diffusion import DiffusionParameters
from shared.schemas.fields import Priority
from shared.wire import Header

FEW_UNREAD = 4
"""A client that has so many news to read gets no preview on top."""


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
class Waits:
    """The picture is at this place in the queue; 1 is begun next."""

    place: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """`step` of `steps` are done; the others take about `seconds_left`."""

    step: int
    steps: int
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Sketch:
    """Pixels of a preview after `step` steps, a numpy array uint8 [height, width, 3]."""

    step: int
    pixels: Any


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pixels as a numpy array uint8 [height, width, 3]."""

    pixels: Any


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture and what it took."""

    png: bytes
    thumbnail: bytes
    timings: Timings = field(default_factory=Timings)


News = Waits | StepDone | Sketch


class PictureJob(Job[Drawn]):
    """A picture that waits or is being made; made in the event loop, carried forward by the device's thread."""

    def __init__(self, request: PictureRequest, shape: Shape, *, watched: bool) -> None:
        super().__init__()
        self.request = request
        self.watched = watched
        self.timings = Timings()
        self.denoising: Denoising | None = None
        self.turn = 0
        self.place = 0
        self.begun_at = 0.0
        self._first_shape = shape
        self._steps_done = 0  # when it was let go
        self._news: asyncio.Queue[News | None] = asyncio.Queue()

    @property
    def shape(self) -> Shape:
        """Of the next step."""
        return self._first_shape if self.denoising is None else self.denoising.shape

    @property
    def priority(self) -> Priority:
        """As it was asked for."""
        return self.request.parameters.priority

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self._steps_done if self.denoising is None else self.denoising.step

    @property
    def steps_left(self) -> int:
        """Steps that are still to be done."""
        return self.request.parameters.steps - self.step

    def begin(self, denoising: Denoising, turn: int) -> None:
        """It is in the making from now on."""
        self.denoising, self.turn, self.begun_at = denoising, turn, time.monotonic()
        self.timings.queue = self.begun_at - self.created_at

    def let_go(self) -> None:
        """Its latents, embeddings and LoRAs are needed no more, however long its client takes to read the rest."""
        self._steps_done, self.denoising = self.step, None

    def wants_sketch(self) -> bool:
        """A preview is due after the step that is done, and the client keeps up with the news."""
        every, steps = self.request.parameters.preview_every, self.request.parameters.steps
        due = self.watched and every > 0 and self.step % every == 0 and self.step < steps
        return due and self._news.qsize() < FEW_UNREAD

    def told_step(self) -> StepDone:
        """How far it is, and how long the rest takes if steps come as they came so far."""
        elapsed = time.monotonic() - self.begun_at
        left = self.request.parameters.steps - self.step
        return StepDone(self.step, self.request.parameters.steps, elapsed / max(1, self.step) * left)

    def tell(self, news: News) -> None:
        """Passes on what happened, if anyone watches. Called from any thread."""
        if self.watched:
            self._call(self._news.put_nowait, news)

    async def news(self) -> AsyncGenerator[News]:
        """What happens until the job ends, well or not."""
        while (news := await self._news.get()) is not None:
            yield news

    def _resolve(self, result: Drawn) -> None:
        super()._resolve(result)
        self._news.put_nowait(None)

    def _fail(self, error: Exception) -> None:
        super()._fail(error)
        self._news.put_nowait(None)
