"""The one thread that owns a device: it loads the model and does all the work on it."""

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import structlog

from shared.checkpoint import UnusableModel
from shared.errors import DeviceFailed, NotBegun, Unready

EXIT_UNUSABLE_MODEL = 78
EXIT_DEVICE_FAILED = 70  # EX_SOFTWARE of sysexits.h: a new process may do better

M = TypeVar("M")
M_contra = TypeVar("M_contra", contravariant=True)
log = structlog.get_logger(__name__)


def device_failed() -> DeviceFailed:
    """What is told to those whose work was under way when the device was lost."""
    return DeviceFailed("The device failed while it worked on this request; the service starts anew.", retry_after_s=5)


def not_begun() -> NotBegun:
    """What is told to those who still waited."""
    return NotBegun("The device failed before it had begun this request; the service starts anew.", retry_after_s=5)


class Tick(Protocol[M_contra]):
    """Does one piece of work on the model; answers whether there may be more."""

    def __call__(self, model: M_contra, /) -> bool:
        """Runs in the device's thread."""


class DeviceThread(Generic[M]):
    """Loads a model in a thread of its own, then calls `tick` there as long as there is work.

    When a tick breaks, `on_loss` ends all that waits: the process will stop, but not before its requests are answered.
    `on_failure` is called with an exit status then, and when the model cannot be loaded: the process should end.
    """

    def __init__(
        self,
        name: str,
        *,
        load: Callable[[], M],
        tick: Tick[M],
        on_loss: Callable[[], None] | None = None,
        on_failure: Callable[[int], None] | None = None,
    ) -> None:
        self._load, self._tick, self._on_loss, self._on_failure = load, tick, on_loss, on_failure
        self._model: M | None = None
        self._reason: str | None = "the model is being loaded"
        self._stopping = False
        self._wakeup = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def model(self) -> M:
        """The loaded model. Raises Unready before that and after a failure."""
        if self._model is None or self._reason is not None:
            raise Unready(f"Not ready: {self._reason}.", retry_after_s=2)
        return self._model

    def unready_reason(self) -> str | None:
        """Why no work can be done, or None."""
        return self._reason

    @property
    def stopping(self) -> bool:
        """The process is ending: a tick that takes long should give up at its next step."""
        return self._stopping

    def start(self) -> None:
        """Begins to load."""
        self._thread.start()

    def wake(self) -> None:
        """Says that there is work."""
        self._wakeup.set()

    async def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after the tick that runs."""
        self._stopping, self._reason = True, "the service is stopping"
        self._wakeup.set()
        await asyncio.to_thread(self._thread.join, timeout_s)

    def _run(self) -> None:
        try:
            model = self._load()
        except UnusableModel as error:
            self._fail(EXIT_UNUSABLE_MODEL, str(error))
            log.error("the model cannot be used", reason=str(error))  # noqa: TRY400 - the sentence says it all
            return
        except BaseException:  # the thread's outermost frame; a library's panic is no Exception
            self._fail(EXIT_DEVICE_FAILED, "the model could not be loaded")
            log.exception("the model could not be loaded")
            return
        self._model = model
        if not self._stopping:
            self._reason = None
        self._work(model)

    def _work(self, model: M) -> None:
        while not self._stopping:
            self._wakeup.wait()
            self._wakeup.clear()
            try:
                while not self._stopping and self._tick(model):
                    pass
            except BaseException:  # the thread's outermost frame; a library's panic is no Exception
                self._fail(EXIT_DEVICE_FAILED, "the device failed")
                log.exception("the device's thread failed, the process ends")
                if self._on_loss is not None:
                    self._on_loss()
                return

    def _fail(self, exit_code: int, reason: str) -> None:
        self._reason = reason
        if self._on_failure is not None:
            self._on_failure(exit_code)
