"""`shared.device_thread`: loading, working, failing and stopping."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest
import structlog
from inprocess import eventually

from shared.checkpoint import UnusableModel
from shared.device_thread import EXIT_DEVICE_FAILED, EXIT_UNUSABLE_MODEL, DeviceThread
from shared.errors import Unready
from shared.serving import EXIT_UNUSABLE

PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def nothing_to_do(_: str) -> bool:
    return False


def test_the_exit_status_is_the_one_that_the_runner_knows() -> None:
    assert EXIT_UNUSABLE_MODEL == EXIT_UNUSABLE == 78
    assert EXIT_DEVICE_FAILED == 70


async def test_unready_until_the_model_is_loaded() -> None:
    may_load = threading.Event()

    def load() -> str:
        may_load.wait(PATIENCE_S)
        return "a model"

    device = DeviceThread("test", load=load, tick=nothing_to_do)
    assert device.unready_reason() == "the model is being loaded"
    device.start()
    with pytest.raises(Unready, match="the model is being loaded") as refused:
        _ = device.model
    assert refused.value.retry_after_s == 2
    may_load.set()
    await eventually(lambda: device.unready_reason() is None)
    assert device.model == "a model"
    await device.stop()


async def test_it_ticks_as_long_as_there_is_work() -> None:
    work: list[int] = [1, 2, 3]
    seen: list[tuple[str, int, str]] = []

    def tick(model: str) -> bool:
        if not work:
            return False
        seen.append((model, work.pop(0), threading.current_thread().name))
        return True

    device = DeviceThread("the device", load=lambda: "m", tick=tick)
    device.start()
    device.wake()
    await eventually(lambda: len(seen) == 3)
    work.append(4)
    device.wake()
    await eventually(lambda: len(seen) == 4)
    assert seen == [("m", number, "the device") for number in (1, 2, 3, 4)]
    await device.stop()


async def test_work_that_came_before_the_model_was_loaded_is_done() -> None:
    may_load, done = threading.Event(), threading.Event()

    def load() -> str:
        may_load.wait(PATIENCE_S)
        return "m"

    def tick(_: str) -> bool:
        done.set()
        return False

    device = DeviceThread("test", load=load, tick=tick)
    device.start()
    device.wake()
    assert not done.is_set()
    may_load.set()
    await eventually(done.is_set)
    await device.stop()


def raise_unusable() -> str:
    raise UnusableModel("the model directory /nowhere does not exist")


def raise_anything() -> str:
    raise RuntimeError("a library's own text")


@pytest.mark.parametrize(
    ("load", "status", "reason"),
    [
        (raise_unusable, EXIT_UNUSABLE_MODEL, "the model directory /nowhere does not exist"),
        (raise_anything, EXIT_DEVICE_FAILED, "the model could not be loaded"),
    ],
)
async def test_a_model_that_cannot_be_loaded(load: Callable[[], str], status: int, reason: str) -> None:
    statuses: list[int] = []
    device = DeviceThread("test", load=load, tick=nothing_to_do, on_failure=statuses.append)
    device.start()
    await eventually(lambda: statuses)
    assert statuses == [status]
    assert device.unready_reason() == reason
    with pytest.raises(Unready) as refused:
        _ = device.model
    assert "library" not in refused.value.detail
    await device.stop()


class Panic(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize("error", [RuntimeError("a library's own text"), Panic()])
async def test_a_tick_that_breaks_ends_the_thread_and_asks_for_an_exit(error: BaseException) -> None:
    statuses: list[int] = []
    ticks: list[int] = []

    def tick(_: str) -> bool:
        ticks.append(1)
        raise error

    device = DeviceThread("test", load=lambda: "m", tick=tick, on_failure=statuses.append)
    device.start()
    device.wake()
    await eventually(lambda: statuses)
    assert statuses == [EXIT_DEVICE_FAILED]
    assert device.unready_reason() == "the device failed"
    with pytest.raises(Unready):
        _ = device.model
    device.wake()
    await device.stop()
    assert len(ticks) == 1


async def test_nobody_need_listen_to_failures() -> None:
    device = DeviceThread("test", load=raise_anything, tick=nothing_to_do)
    device.start()
    await eventually(lambda: device.unready_reason() == "the model could not be loaded")
    await device.stop()


async def test_stop_waits_for_the_tick_that_runs_and_for_no_other() -> None:
    begun, may_end = threading.Event(), threading.Event()
    ticks: list[bool] = []

    def tick(_: str) -> bool:
        begun.set()
        may_end.wait(PATIENCE_S)
        ticks.append(device.stopping)
        return True

    device = DeviceThread("test", load=lambda: "m", tick=tick)
    device.start()
    device.wake()
    await eventually(begun.is_set)
    stopping = asyncio.create_task(device.stop())
    await eventually(lambda: device.stopping)
    assert device.unready_reason() == "the service is stopping"
    assert not stopping.done()
    may_end.set()
    await stopping
    assert ticks == [True]


async def test_stop_while_the_model_is_being_loaded() -> None:
    begun, may_load = threading.Event(), threading.Event()
    ticks: list[int] = []

    def load() -> str:
        begun.set()
        may_load.wait(PATIENCE_S)
        return "m"

    def tick(_: str) -> bool:
        ticks.append(1)
        return False

    device = DeviceThread("test", load=load, tick=tick)
    device.start()
    device.wake()
    await eventually(begun.is_set)
    stopping = asyncio.create_task(device.stop())
    await eventually(lambda: device.stopping)
    may_load.set()
    await stopping
    assert device.unready_reason() == "the service is stopping"
    assert not ticks


async def test_stop_gives_up_on_a_tick_that_never_ends() -> None:
    begun, release = threading.Event(), threading.Event()

    def tick(_: str) -> bool:
        begun.set()
        release.wait(PATIENCE_S)
        return False

    device = DeviceThread("test", load=lambda: "m", tick=tick)
    device.start()
    device.wake()
    await eventually(begun.is_set)
    await device.stop(timeout_s=0.01)
    assert device.unready_reason() == "the service is stopping"
    release.set()
    await device.stop()
