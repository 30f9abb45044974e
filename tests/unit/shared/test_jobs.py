"""`shared.jobs`: work handed from the event loop to a thread."""

import asyncio
import threading

import pytest

from shared.errors import InternalError
from shared.jobs import Job


async def in_thread(call: object, *arguments: object) -> None:
    await asyncio.to_thread(call, *arguments)  # type: ignore[arg-type]


async def test_a_thread_resolves_it() -> None:
    job: Job[str] = Job()
    waiter = asyncio.create_task(job.result())
    await in_thread(job.resolve, "done")
    assert await waiter == "done"


async def test_a_thread_fails_it() -> None:
    job: Job[str] = Job()
    waiter = asyncio.create_task(job.result())
    await in_thread(job.fail, InternalError("It broke."))
    with pytest.raises(InternalError, match="It broke"):
        await waiter


async def test_it_may_end_before_anybody_waits() -> None:
    job: Job[int] = Job()
    await in_thread(job.resolve, 3)
    assert await job.result() == 3


async def test_waiting_that_is_cancelled_cancels_the_job() -> None:
    job: Job[str] = Job()
    waiter = asyncio.create_task(job.result())
    await asyncio.sleep(0)
    assert not job.cancelled
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert job.cancelled


async def test_an_end_that_comes_too_late_is_ignored() -> None:
    job: Job[str] = Job()
    waiter = asyncio.create_task(job.result())
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    await in_thread(job.resolve, "late")
    await in_thread(job.fail, InternalError("later"))
    await asyncio.sleep(0)
    assert job.cancelled


async def test_a_job_that_is_given_up_ends_the_waiting() -> None:
    job: Job[str] = Job()
    waiter = asyncio.create_task(job.result())
    await asyncio.sleep(0)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert job.cancelled
    await in_thread(job.resolve, "late")


async def test_giving_up_a_job_that_has_ended_changes_nothing() -> None:
    job: Job[str] = Job()
    await in_thread(job.resolve, "done")
    await asyncio.sleep(0)
    job.cancel()
    assert await job.result() == "done"


async def test_only_the_first_end_counts() -> None:
    job: Job[str] = Job()
    await in_thread(job.resolve, "first")
    await in_thread(job.resolve, "second")
    await in_thread(job.fail, InternalError("third"))
    assert await job.result() == "first"


async def test_numbers_rise() -> None:
    numbers = [Job[int]().number for _ in range(5)]
    assert numbers == sorted(set(numbers))


def test_a_thread_that_outlives_the_loop_does_not_break() -> None:
    async def make() -> Job[str]:
        return Job()

    job = asyncio.run(make())
    thread = threading.Thread(target=job.resolve, args=("late",))
    thread.start()
    thread.join()
    assert job.cancelled


async def test_many_threads_and_many_jobs() -> None:
    jobs: list[Job[int]] = [Job() for _ in range(200)]
    waiting = asyncio.gather(*(job.result() for job in jobs))
    threads = [
        threading.Thread(target=lambda part=part: [job.resolve(job.number) for job in jobs[part::8]])
        for part in range(8)
    ]
    for thread in threads:
        thread.start()
    assert await waiting == [job.number for job in jobs]
    for thread in threads:
        await asyncio.to_thread(thread.join)
