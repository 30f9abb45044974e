"""The order of work: who is begun, who steps next, and that nobody waits forever."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.diffusion.order import Limits, admissible, in_line, next_decoded, next_group
from services.diffusion.shapes import Shape
from shared.schemas.fields import Priority

SMALL = Shape(height=64, width=64, text_tokens=32)
LARGE = Shape(height=256, width=256, text_tokens=32)
INKED = replace(SMALL, loras=(("ink", 0.5),))
LIMITS = Limits(running=6, batch=3, batch_tokens=600, decode_pixels=3 * 64 * 64)


@dataclass(slots=True)
class Job:
    """A picture as its place in the order depends on it."""

    number: int
    shape: Shape = SMALL
    priority: Priority = Priority.NORMAL
    turn: int = 0
    steps: int = 3

    @property
    def steps_left(self) -> int:
        """As many as there are."""
        return self.steps


def anything(_: Sequence[Shape]) -> bool:
    return True


JOBS = st.lists(
    st.builds(
        Job,
        number=st.just(0),
        shape=st.sampled_from([SMALL, LARGE, INKED]),
        priority=st.sampled_from(Priority),
        steps=st.integers(1, 5),
    ),
    min_size=1,
    max_size=20,
).map(lambda jobs: [replace(job, number=number) for number, job in enumerate(jobs)])


@given(JOBS)
def test_all_are_begun_and_done_within_the_limits(jobs: list[Job]) -> None:
    waiting, running, done, ticks = list(jobs), list[Job](), list[Job](), 0
    while waiting or running:
        chosen = admissible(waiting, running, LIMITS, anything)
        for job in chosen:
            waiting.remove(job)
            job.turn = ticks
        running += chosen
        assert len(running) <= LIMITS.running
        group = next_group(running, LIMITS)
        assert 1 <= len(group) <= LIMITS.batch_of(group[0].shape)
        assert len({job.shape for job in group}) == 1
        oldest = min(job.turn for job in running)
        assert min(job.turn for job in group) == oldest, "the group whose turn is longest ago is next"
        groups = len({job.shape for job in running})
        ticks += 1
        for job in group:
            assert ticks - job.turn <= groups + len(jobs), "nobody's turn is put off without end"
            job.turn, job.steps = ticks, job.steps - 1
        done += [job for job in group if not job.steps]
        running = [job for job in running if job.steps]
        assert ticks <= 5 * len(jobs)
    assert sorted(job.number for job in done) == [job.number for job in jobs]


def test_groups_take_turns_however_many_join_one_of_them() -> None:
    large, stepped = Job(0, LARGE, steps=100), []
    running = [large, Job(1), Job(2)]
    for tick in range(1, 20):
        running.append(replace(Job(2 + tick), turn=tick - 1))
        group = next_group(running, LIMITS)
        for job in group:
            job.turn = tick
        stepped.append(group == [large])
        running = [job for job in running if job is large or job not in group]
    assert all(one or other for one, other in pairwise(stepped)), stepped


@given(JOBS)
def test_a_line_is_by_priority_then_age(jobs: list[Job]) -> None:
    ranks = list(Priority)
    line = [(ranks.index(job.priority), job.number) for job in in_line(reversed(jobs))]
    assert line == sorted(line)


def test_one_that_does_not_fit_holds_up_those_behind_it() -> None:
    """If smaller ones went first, there might never be room for it."""

    def fits(shapes: Sequence[Shape]) -> bool:
        return sum(shape.pixels for shape in shapes) <= LARGE.pixels

    waiting = [Job(1, LARGE), Job(2)]
    assert admissible(waiting, [Job(0)], LIMITS, fits) == []
    assert admissible(waiting, [], LIMITS, fits) == waiting[:1]


def test_one_whose_group_is_full_is_passed_over() -> None:
    running = [Job(number) for number in range(3)]
    waiting = [Job(3), Job(4, LARGE), Job(5, INKED)]
    assert admissible(waiting, running, LIMITS, anything) == waiting[1:]


@pytest.mark.parametrize(
    ("one", "joins"),
    [
        (Job(9, steps=50), True),
        (Job(9, steps=51), False),
        (Job(9, steps=100, priority=Priority.HIGH), True),
        (Job(9, steps=50, priority=Priority.LOW), True),
        (Job(9, LARGE, steps=100), True),
    ],
)
def test_a_full_group_takes_in_what_is_short_or_urgent(one: Job, *, joins: bool) -> None:
    running = [Job(number, steps=100) for number in range(3)]
    assert admissible([one], running, LIMITS, anything) == [one] * joins


def test_a_full_group_takes_in_only_as_many_again() -> None:
    running = [Job(number, steps=100) for number in range(3)]
    waiting = [Job(number, steps=4) for number in range(3, 9)]
    limits = replace(LIMITS, running=100)
    assert admissible(waiting, running, limits, anything) == waiting[:3]


def test_a_short_picture_does_not_wait_for_a_long_one_of_its_shape() -> None:
    limits = replace(LIMITS, batch=1)
    waiting, running = [Job(1, steps=4)], [Job(0, steps=100)]
    for tick in range(1, 9):
        chosen = admissible(waiting, running, limits, anything)
        waiting = [job for job in waiting if job not in chosen]
        running += chosen
        for job in next_group(running, limits):
            job.turn, job.steps = tick, job.steps - 1
    assert [job.steps for job in running] == [96, 0]


@pytest.mark.parametrize(("shape", "expected"), [(SMALL, 3), (LARGE, 2), (replace(LARGE, negative_tokens=32), 1)])
def test_how_many_share_a_step(shape: Shape, expected: int) -> None:
    assert LIMITS.batch_of(shape) == expected
    assert replace(LIMITS, batch_tokens=1).batch_of(shape) == 1, "one always may"


@pytest.mark.parametrize(("shape", "parts"), [(SMALL, [3, 3, 1]), (LARGE, [1] * 7)])
def test_how_many_are_decoded_together(shape: Shape, parts: list[int]) -> None:
    finished = [Job(number, shape, steps=0) for number in range(7)]
    running = [Job(7, shape), *finished, Job(8, replace(shape, width=128), steps=0)]
    together = []
    for _ in parts:
        together.append(next_decoded(running, LIMITS))
        running = [job for job in running if job not in together[-1]]
    assert [len(part) for part in together] == parts
    assert [job for part in together for job in part] == finished


def test_what_is_done_waits_for_its_decoding_without_a_step_and_makes_room_in_its_group() -> None:
    running = [Job(number, steps=0) for number in range(3)]
    assert next_group(running, LIMITS) == []
    waiting = [Job(number) for number in range(3, 6)]
    assert admissible(waiting, running, LIMITS, anything) == waiting


def test_nothing_to_do() -> None:
    assert next_group([], LIMITS) == admissible([], [], LIMITS, anything) == next_decoded([], LIMITS) == []
