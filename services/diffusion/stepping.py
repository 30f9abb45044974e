"""The device thread's side of the engine: pictures that wait, pictures in the making, and the tick that moves them on.

A tick begins what can be begun, decodes a part of what is finished, and makes one step for one group: who gives a
picture up waits for no more than that. Whatever happens to one picture, the others go on; an error after which the
device answers no more ends all of them, each with its reason.
"""

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import structlog

from services.diffusion.denoising import Denoising
from services.diffusion.group_sizes import GroupSizes
from services.diffusion.jobs import Drawn, PictureJob, Sketch, Waits
from services.diffusion.model import ZImageModel
from services.diffusion.order import Limits, admissible, in_line, next_decoded, next_group
from shared.errors import InternalError, NumericalError, OutOfMemory, QueueFull, ServiceError
from shared.schemas.diffusion import NEGATIVE, TEXT
from shared.tensors import DEVICE_ERROR, describe

RETRY_AFTER_S = 5
BEGINNING_S = 0.05  # pictures are begun for so long before those in the making go on; one always is
FULL = "The device has too little free memory for this picture."
OVERFLOWED = "The model's numbers overflowed {where}; try another seed or float32 weights."

log = structlog.get_logger(__name__)


class StepScheduler:
    """Pictures that wait and pictures that run. `tick` belongs to the device's thread, all else to the event loop."""

    def __init__(self, limits: Limits, *, max_waiting: int, memory_bytes: int | None = None) -> None:
        self.limits = limits
        self.max_waiting = max_waiting
        self._memory_bytes = memory_bytes
        self._free_bytes: int | None = None
        self._sizes = GroupSizes()
        self._settled = False  # nothing has changed since no waiting picture could be begun
        self._waiting: list[PictureJob] = []
        self._running: list[PictureJob] = []
        self._refused: ServiceError | None = None
        self._ticks = 0
        self._lock = threading.Lock()

    @property
    def waiting(self) -> list[PictureJob]:
        """Pictures in the queue, in the order in which they are begun."""
        return in_line(list(self._waiting))

    @property
    def running(self) -> list[PictureJob]:
        """Pictures in the making."""
        return list(self._running)

    def check_room(self) -> None:
        """Raises QueueFull when no further picture may wait."""
        if len(self._waiting) >= self.max_waiting:
            raise QueueFull(
                f"{len(self._waiting)} pictures are waiting already; try again soon.", retry_after_s=RETRY_AFTER_S
            )

    def add(self, job: PictureJob) -> None:
        """Puts a picture into the queue. Raises QueueFull, and what all were refused with."""
        with self._lock:
            if self._refused is not None:
                raise self._refused
            self.check_room()
            self._waiting.append(job)
            self._settled = False
            self._tell_places()

    def drop(self, job: PictureJob) -> None:
        """Nobody waits for the picture any more: it takes no place in the queue, and makes no further step."""
        job.cancelled = True
        with self._lock:
            if job in self._waiting:
                self._waiting.remove(job)
                self._settled = False
                self._tell_places()

    def refuse_all(self, begun: ServiceError, waiting: ServiceError) -> None:
        """Ends every picture with an error, those in the making with another than those that wait or are still to
        come."""
        with self._lock:
            self._refused = waiting
            left, self._waiting = [*self._running, *self._waiting], []
            self._running = []
        for job in left:
            job.fail(waiting if job.denoising is None else begun)

    def tick(self, model: ZImageModel) -> bool:
        """Moves pictures on by one step of one group; answers whether there may be more to do.

        What it raises says that every further call of the device fails: only a new process helps.
        """
        self._let_go()
        self._admit(model)
        self._begin_admitted(model)
        finished = next_decoded(self._begun(), self.limits)
        if finished:
            self._decode(model, finished)
        group = next_group(self._begun(), self.limits)
        if group:
            self._ticks += 1
            self._step(model, group[: self._sizes.most(group[0].shape)])
        return bool(self._running or self._waiting)

    def _begun(self) -> list[PictureJob]:
        return [job for job in self._running if job.denoising is not None]

    def _let_go(self) -> None:
        """Pictures that were given up leave between two steps."""
        for job in self._running:
            if job.cancelled:
                log.info("picture cancelled", request_id=job.request.request_id, step=job.step)
                job.let_go()
                self._settled = False
        self._running = [job for job in self._running if not job.cancelled]

    def _admit(self, model: ZImageModel) -> None:
        """Moves waiting pictures among those in the making, where there is room for them."""
        if not self._waiting or (self._running and self._settled):
            return
        if not self._running:  # only then is what is free not what pictures in the making have left over
            self._measure(model)
        with self._lock:
            chosen = self._admissible(model)
            head = [] if chosen or self._running else self.waiting[:1]
            if head and model.footprint.decode_in_tiles(head[0].shape.pixels):
                chosen = self._admissible(model)
            too_large = bool(head) and not chosen
            if too_large:
                chosen = head
            self._waiting = [job for job in self._waiting if job not in chosen]
            self._running += [] if too_large else chosen
            self._settled = not too_large
            self._tell_places()
        if too_large:
            chosen[0].fail(OutOfMemory(FULL, retry_after_s=10))
        elif chosen:
            model.make_room([job.shape for job in self._running], self._free_bytes)

    def _measure(self, model: ZImageModel) -> None:
        """Looks how much memory there is for pictures, which other programs on the device change too."""
        self._sizes.forget()
        self._free_bytes = model.free_bytes() if self._memory_bytes is None else self._memory_bytes
        if self._free_bytes is not None:
            model.footprint.tile_within(self._free_bytes)

    def _admissible(self, model: ZImageModel) -> list[PictureJob]:
        return admissible(
            self._waiting, self._running, self.limits, lambda shapes: model.fits(shapes, self._free_bytes)
        )

    def _begin_admitted(self, model: ZImageModel) -> None:
        """Begins pictures, not all at once where that takes long: others are in the making."""
        end = time.monotonic() + BEGINNING_S
        for job in [job for job in self._running if job.denoising is None]:
            self._begin(model, job)
            if time.monotonic() > end:
                return

    def _begin(self, model: ZImageModel, job: PictureJob) -> None:
        request = job.request
        try:
            text = model.read_embeddings(request.message, request.header, TEXT)
            negative = model.read_embeddings(request.message, request.header, NEGATIVE) if request.guided else None
            if log.is_enabled_for(logging.DEBUG):
                log.debug("embeddings arrived", request_id=request.request_id, **describe(text))
            references = [
                model.read_embeddings(request.message, request.header, name) for name in request.parameters.references
            ]
            denoising = model.start(request.parameters, text, negative, job.shape.loras, references)
            job.begin(denoising, self._ticks)
        except Exception as error:  # noqa: BLE001 - one bad picture must not end the service
            self._end(job, self._look_at(model, [job], error))

    def _step(self, model: ZImageModel, group: Sequence[PictureJob]) -> None:
        try:
            overflowed = model.step(_denoisings(group))
        except Exception as error:  # noqa: BLE001 - one bad picture must not end the service
            told = self._look_at(model, group, error)
        else:
            self._sizes.note_success(group[0].shape, len(group))
            for job in group:
                self._note_step(model, job, overflowed)
            return
        # Here the error is gone, and with it the frames that held the step's tensors.
        if len(group) == 1:
            self._end(group[0], told)
            return
        if isinstance(told, OutOfMemory):
            self._sizes.note_failure(group[0].shape, len(group))
        for half in (group[: len(group) // 2], group[len(group) // 2 :]):
            self._step(model, half)

    def _note_step(self, model: ZImageModel, job: PictureJob, overflowed: Sequence[Denoising]) -> None:
        job.turn = self._ticks
        if job.denoising in overflowed:
            steps = job.request.parameters.steps
            self._end(job, NumericalError(OVERFLOWED.format(where=f"at step {job.step} of {steps}")))
            return
        job.tell(job.told_step())
        if job.request.parameters.cfg_truncation < 1:  # its next step may have another shape
            self._settled = False
        if not job.steps_left:
            job.timings.denoise = time.monotonic() - job.begun_at
            self._settled = False
        elif job.denoising is not None and job.wants_sketch():
            self._sketch(model, job, job.denoising)

    def _sketch(self, model: ZImageModel, job: PictureJob, denoising: Denoising) -> None:
        try:
            pixels = model.preview(denoising)
        except Exception as error:  # noqa: BLE001 - a preview that fails costs nobody the picture
            self._look_at(model, [job], error)
            return
        if pixels is not None:
            job.tell(Sketch(job.step, pixels))

    def _decode(self, model: ZImageModel, jobs: Sequence[PictureJob]) -> None:
        """Makes pixels of pictures of one size whose steps are done."""
        started = time.monotonic()
        try:
            arrays = model.decode(_denoisings(jobs))
        except Exception as error:  # noqa: BLE001 - one bad picture must not end the service
            told = self._look_at(model, jobs, error)
        else:
            for job, pixels in zip(jobs, arrays, strict=True):
                job.timings.decode = time.monotonic() - started
                self._finish(model, job, pixels)
            return
        pixels = jobs[0].shape.pixels
        if len(jobs) == 1 and not (isinstance(told, OutOfMemory) and model.footprint.decode_in_tiles(pixels)):
            self._end(jobs[0], told)
            return
        for job in jobs:
            self._decode(model, [job])

    def _finish(self, model: ZImageModel, job: PictureJob, pixels: Any) -> None:
        if pixels is None:
            self._end(job, NumericalError(OVERFLOWED.format(where="while it was decoded")))
            return
        self._leave(job)
        job.resolve(Drawn(pixels))
        model.footprint.note_success()

    def _look_at(self, model: ZImageModel, jobs: Sequence[PictureJob], error: Exception) -> ServiceError:
        """Learns from an error, finds out whether the device still answers, and answers what is to be told. Raises what
        says that it does not."""
        if isinstance(error, DEVICE_ERROR):
            raise error
        ids = [job.request.request_id for job in jobs]
        if isinstance(error, ServiceError):
            told: ServiceError = error.with_traceback(None)  # whose frames have the pictures
        else:
            log.error("a picture failed", request_ids=ids, steps=[job.step for job in jobs], exc_info=error)
            told = _told_of_unknown(model)
        if isinstance(told, OutOfMemory):
            model.footprint.note_error()
            model.drop_idle_loras()
            log.warning("the device ran out of memory", request_ids=ids)
        return told

    def _end(self, job: PictureJob, error: ServiceError) -> None:
        self._leave(job)
        job.fail(error)

    def _leave(self, job: PictureJob) -> None:
        """It is no longer in the making; all may have been taken out of it already, while the device worked."""
        self._running = [other for other in self._running if other is not job]
        self._settled = False
        job.let_go()

    def _tell_places(self) -> None:
        for place, job in enumerate(in_line(self._waiting), start=1):
            if job.place != place:
                job.place = place
                job.tell(Waits(place))


def _told_of_unknown(model: ZImageModel) -> ServiceError:
    """What is told of an error that says nothing: where the device is full that is taken for its cause. Raises what
    says that the device is lost."""
    with suppress(OutOfMemory):
        model.check_device()
        return InternalError("The picture could not be made; the server's log has the cause.")
    return OutOfMemory(FULL, retry_after_s=10)  # not raised, or it would hold on to the error and its tensors


def _denoisings(jobs: Sequence[PictureJob]) -> list[Denoising]:
    return [job.denoising for job in jobs if job.denoising is not None]
