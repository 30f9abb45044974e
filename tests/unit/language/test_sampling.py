"""`draw` and `shares`: the filters are transformers', seeds are kept, and bad scores hurt nobody else."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shared.language.options import Sampling
from shared.language.sampling import BROKEN, Sampler, draw, shares

VOCABULARY = 40


def scores(*seeds: int) -> torch.Tensor:
    return torch.stack([3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def sampling(**fields: float) -> Sampling:
    return Sampling(**{"seed": 0, **fields})  # type: ignore[arg-type]


def distribution(row: torch.Tensor, one: Sampling) -> torch.Tensor:
    """What `shares` gives, as a distribution in the order of the vocabulary."""
    chances, tokens = shares(row.unsqueeze(0), [one])
    return torch.zeros(VOCABULARY).scatter(0, tokens[0], chances[0] / chances.sum())


def by_transformers(row: torch.Tensor, one: Sampling) -> torch.Tensor:
    """The distribution that `generate` draws from."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(one.temperature)])
    if one.top_k:
        processors.append(TopKLogitsWarper(one.top_k))
    if 0 < one.top_p < 1:
        processors.append(TopPLogitsWarper(one.top_p))
    if one.min_p:
        processors.append(MinPLogitsWarper(one.min_p))
    return processors(torch.zeros(1, 1, dtype=torch.long), row.unsqueeze(0))[0].softmax(dim=-1)


@given(
    seed=st.integers(0, 1_000),
    temperature=st.floats(0.05, 2.0),
    top_k=st.integers(0, VOCABULARY),
    top_p=st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
)
def test_the_filters_are_transformers(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    one = sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    row = scores(seed)[0]
    torch.testing.assert_close(distribution(row, one), by_transformers(row, one), rtol=1e-4, atol=1e-5)


def test_temperature_zero_takes_the_likeliest() -> None:
    given_scores = scores(1, 2, 3)
    samplers = [Sampler(sampling(temperature=0, top_p=0.1)) for _ in range(3)]
    assert draw(given_scores, samplers) == given_scores.argmax(dim=-1).tolist()


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_the_narrowest_filters_leave_one_token(filters: dict[str, float]) -> None:
    given_scores = scores(1)
    sampler = Sampler(sampling(temperature=2.0, **filters))
    assert {draw(given_scores, [sampler])[0] for _ in range(20)} == {int(given_scores.argmax())}


def drawn(one: Sampling, times: int, row: torch.Tensor) -> list[int]:
    sampler = Sampler(one)
    return [draw(row, [sampler])[0] for _ in range(times)]


def test_a_seed_draws_the_same_again_and_another_does_not() -> None:
    row = scores(5)
    first, again, other = (drawn(Sampling(seed=seed), 30, row) for seed in (2**63 - 1, 2**63 - 1, 8))
    assert first == again
    assert first != other


def test_who_else_is_in_the_batch_does_not_matter() -> None:
    row, others = scores(5), scores(6, 7)
    alone = drawn(Sampling(seed=3), 20, row)
    mine, greedy, wild = Sampler(Sampling(seed=3)), Sampler(sampling(temperature=0)), Sampler(sampling(temperature=2))
    together = [draw(torch.cat([others[:1], row, others[1:]]), [greedy, mine, wild])[1] for _ in range(20)]
    assert together == alone


def test_tokens_come_as_often_as_they_should() -> None:
    row = scores(9)
    count = Counter(drawn(sampling(temperature=1.5, top_k=6), 4_000, row))
    wanted = by_transformers(row[0], sampling(temperature=1.5, top_k=6))
    assert set(count) == set(wanted.nonzero().flatten().tolist())
    for token, times in count.items():
        assert times / 4_000 == pytest.approx(float(wanted[token]), abs=0.04)


def test_presence_penalty_counts_once_and_frequency_penalty_each_time() -> None:
    row = torch.tensor([[5.0, 4.0, 3.0, 0.0]])
    once = Sampler(sampling(temperature=0, presence_penalty=1.5))
    assert [draw(row, [once])[0] for _ in range(4)] == [0, 1, 0, 0]
    each = Sampler(sampling(temperature=0, frequency_penalty=1.5))
    assert [draw(row, [each])[0] for _ in range(4)] == [0, 1, 0, 2]
    assert row.tolist() == [[5.0, 4.0, 3.0, 0.0]], "the model's scores are not ours to change"


def test_a_negative_penalty_asks_for_repetition() -> None:
    row = torch.tensor([[1.0, 0.9]])
    sampler = Sampler(sampling(temperature=0, presence_penalty=-2.0))
    sampler.drawn[1] = 1
    assert draw(row, [sampler]) == [1]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers(broken: float, temperature: float) -> None:
    given_scores = scores(1, 2)
    given_scores[0] = broken
    good = given_scores[1].argmax()
    samplers: Sequence[Sampler] = [Sampler(sampling(temperature=temperature, top_k=1)) for _ in range(2)]
    assert draw(given_scores, samplers) == [BROKEN, int(good)]
