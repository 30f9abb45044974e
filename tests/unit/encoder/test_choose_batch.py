"""`choose_batch`: which texts share the next forward."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from services.encoder.engine import LENGTH_RATIO, SHORTEST, Limits, choose_batch


@dataclass(eq=False)
class Waiting:
    """What `choose_batch` looks at of a job."""

    ids: Sequence[int]
    layer: int
    number: int


def waiting(*lengths: int, layers: Sequence[int] | None = None) -> list[Waiting]:
    return [
        Waiting(range(length), layer, number)
        for length, layer, number in zip(lengths, layers or [-2] * len(lengths), count(), strict=False)
    ]


def limits(*, tokens: int = 4096, texts: int = 64) -> Limits:
    return Limits(max_batch_tokens=tokens, max_batch_texts=texts, max_waiting=512, max_tokens=40_960)


def lengths(jobs: Sequence[Waiting]) -> list[int]:
    return [len(job.ids) for job in jobs]


queues = st.lists(st.tuples(st.integers(1, 3000), st.sampled_from([-1, -2, -3])), max_size=40).map(
    lambda items: waiting(*(length for length, _ in items), layers=[layer for _, layer in items])
)
bounds = st.builds(limits, tokens=st.integers(1, 8192), texts=st.integers(1, 64))


@given(queues, bounds)
def test_rules_that_always_hold(queue: list[Waiting], limit: Limits) -> None:
    batch = choose_batch(queue, limit)
    if not queue:
        assert batch == []
        return
    assert batch[0] is queue[0]
    assert len(set(batch)) == len(batch) <= limit.max_batch_texts
    assert all(job in queue for job in batch)
    assert {job.layer for job in batch} == {queue[0].layer}
    counted = [max(length, SHORTEST) for length in lengths(batch)]
    assert max(counted) <= LENGTH_RATIO * min(counted)
    assert len(batch) == 1 or max(counted) * len(batch) <= limit.max_batch_tokens


@given(queues, bounds)
def test_the_same_queue_gives_the_same_batch(queue: list[Waiting], limit: Limits) -> None:
    assert choose_batch(queue, limit) == choose_batch(queue, limit)


@given(queues, bounds)
def test_every_text_is_chosen_in_the_end(queue: list[Waiting], limit: Limits) -> None:
    left, batches = list(queue), 0
    while left:
        batch = choose_batch(left, limit)
        left = [job for job in left if job not in batch]
        batches += 1
    assert batches <= len(queue)


def test_the_oldest_goes_however_long_it_is() -> None:
    assert lengths(choose_batch(waiting(10_000, 10, 10), limits(tokens=100))) == [10_000]


def test_texts_of_equal_length_go_together_in_order() -> None:
    queue = waiting(*[20] * 10)
    assert choose_batch(queue, limits()) == queue
    assert choose_batch(queue, limits(texts=3)) == queue[:3]
    assert choose_batch(queue, limits(tokens=85)) == queue[:4]


def test_the_nearest_in_length_come_first() -> None:
    assert lengths(choose_batch(waiting(100, 60, 101, 150, 99), limits(texts=3))) == [100, 101, 99]


def test_lengths_that_differ_too_much_wait() -> None:
    assert lengths(choose_batch(waiting(100, 49, 201, 50), limits())) == [100, 50]
    assert lengths(choose_batch(waiting(100, 201, 200), limits())) == [100, 200]


def test_short_texts_count_as_equally_long() -> None:
    assert sorted(lengths(choose_batch(waiting(1, 5, 16, 32, 33), limits()))) == [1, 5, 16, 32]


def test_other_layers_wait() -> None:
    queue = waiting(20, 20, 20, 20, layers=[-2, -1, -2, -3])
    assert choose_batch(queue, limits()) == [queue[0], queue[2]]


def test_one_that_would_burst_the_batch_is_passed_over() -> None:
    assert lengths(choose_batch(waiting(50, 90, 40), limits(tokens=100))) == [50, 40]
