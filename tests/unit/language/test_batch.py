"""`Batch` against transformers' `generate`, token for token: alone, together, coming and going."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language import PROMPTS, generate, prompt_ids

from shared.errors import OutOfMemory
from shared.language.batch import Batch, Row
from shared.language.model import LanguageModel
from shared.language.options import Sampling, Wanted
from shared.language.sampling import BROKEN

COUNT = 40


def greedy(ids: Sequence[int], count: int = COUNT) -> Row:
    return Row(Wanted(ids=ids, max_tokens=count, sampling=Sampling(seed=0, temperature=0.0)))


def write(language: LanguageModel, rows: Sequence[Row], *, joins_at: Sequence[int] | None = None) -> list[list[int]]:
    """Writes until all have ended; row i joins at the piece of work `joins_at[i]`, or as soon as it can."""
    batch, done, work = language.batch, 0, 0
    waiting = sorted(zip(joins_at or [0] * len(rows), range(len(rows)), strict=True))
    while done < len(rows):
        if waiting and waiting[0][0] <= work and batch.can_join:
            batch.join(rows[waiting.pop(0)[1]])
        for row, token in batch.advance():
            if len(row.tokens) == row.wanted.max_tokens or token in language.facts.ends:
                batch.leave(row)
                done += 1
        work += 1
        assert work < 5_000
    return [row.tokens for row in rows]


@pytest.fixture(scope="module")
def expected(loaded: LanguageModel) -> list[list[int]]:
    """What `generate` writes after each prompt."""
    return [generate(loaded, prompt_ids(loaded, prompt), COUNT) for prompt in PROMPTS]


def test_the_texts_of_the_tests_vary(expected: list[list[int]]) -> None:
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert max(len(set(tokens)) for tokens in expected) > COUNT / 4


@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_alone(language: LanguageModel, expected: list[list[int]], index: int) -> None:
    assert write(language, [greedy(prompt_ids(language, PROMPTS[index]))]) == [expected[index]]


def test_eight_different_prompts_together(language: LanguageModel, expected: list[list[int]]) -> None:
    assert write(language, [greedy(prompt_ids(language, prompt)) for prompt in PROMPTS]) == expected


@pytest.mark.slow
@given(
    order=st.permutations(range(len(PROMPTS))),
    joins_at=st.lists(st.integers(0, 60), min_size=8, max_size=8),
    counts=st.lists(st.integers(1, COUNT), min_size=8, max_size=8),
)
@settings(max_examples=12)
def test_coming_and_going(
    loaded: LanguageModel, expected: list[list[int]], order: list[int], joins_at: list[int], counts: list[int]
) -> None:
    rows = [greedy(prompt_ids(loaded, PROMPTS[index]), counts[index]) for index in order]
    written = write(loaded, rows, joins_at=joins_at)
    assert written == [expected[index][: counts[index]] for index in order]


def test_one_that_leaves_early_changes_nothing_for_the_others(
    language: LanguageModel, expected: list[list[int]]
) -> None:
    batch = language.batch
    rows = [greedy(prompt_ids(language, prompt)) for prompt in PROMPTS[:4]]
    for row in rows[:3]:
        batch.join(row)
        while not batch.can_join:
            batch.advance()
    batch.join(rows[3])
    batch.leave(rows[0])
    while len(rows[2].tokens) < COUNT and len(rows[2].tokens) < len(expected[2]):
        batch.advance()
        if len(rows[1].tokens) == 20:
            batch.leave(rows[1])
    assert rows[2].tokens == expected[2]
    assert rows[1].tokens == expected[1][: len(rows[1].tokens)]
    assert rows[3].tokens == expected[3][: len(rows[3].tokens)]


def test_a_prompt_in_pieces_lets_the_others_go_on(language: LanguageModel) -> None:
    """Between two pieces of a long prompt every other text gets a token."""
    batch = language.batch
    short, long = greedy(prompt_ids(language, "snow"), 1_000), greedy(prompt_ids(language, PROMPTS[6]))
    batch.join(short)
    batch.advance()
    assert len(short.tokens) == 1
    batch.join(long)
    pieces = -(-len(long.wanted.ids) // batch._piece)
    assert pieces >= 3
    while not long.tokens:
        batch.advance()
    assert len(short.tokens) >= pieces - 1


def test_memory_goes_with_the_last_text(language: LanguageModel) -> None:
    batch = language.batch
    write(language, [greedy(prompt_ids(language, prompt), 5) for prompt in PROMPTS])
    assert (batch._cache.rows, batch._cache.slots) == (0, 0)


def test_the_cache_never_grows_beyond_what_is_wanted(language: LanguageModel) -> None:
    batch = language.batch
    row = greedy(prompt_ids(language, "snow"), 300)
    batch.join(row)
    while len(row.tokens) < 300:
        batch.advance()
        assert batch._cache.slots <= 512
    assert batch._cache.slots >= row.length


def test_scores_that_are_no_numbers_end_only_their_text(language: LanguageModel, expected: list[list[int]]) -> None:
    """Even unread, the numbers that a broken text leaves behind would spoil who comes after it."""
    batch = language.batch
    good, bad = (greedy(prompt_ids(language, prompt)) for prompt in PROMPTS[:2])
    for row in (good, bad):
        batch.join(row)
        while not batch.can_join:
            batch.advance()
    with torch.inference_mode():
        for layer in (*batch._cache._keys, *batch._cache._values):
            layer[1] = torch.nan
    came = dict(batch.advance())
    assert came[bad] == BROKEN
    assert came[good] != BROKEN
    batch.leave(bad)
    batch.leave(good)
    other = [greedy(prompt_ids(language, prompt)) for prompt in PROMPTS[:4]]
    assert write(language, other) == expected[:4]


def test_too_little_memory_empties_the_batch(language: LanguageModel, expected: list[list[int]]) -> None:
    batch: Any = language.batch
    batch.join(greedy(prompt_ids(language, "snow")))
    batch.advance()

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory, a library's own text")

    batch._forward, forward = run_out, batch._forward
    with pytest.raises(OutOfMemory, match="too little free memory") as failed:
        batch.advance()
    assert failed.value.retry_after_s
    batch._forward = forward
    assert batch.advance() == []
    assert write(language, [greedy(prompt_ids(language, PROMPTS[0]))]) == expected[:1]


def test_nothing_to_do(language: LanguageModel) -> None:
    assert language.batch.advance() == []
    assert isinstance(language.batch, Batch)
