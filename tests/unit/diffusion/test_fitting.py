"""`services.diffusion.fitting`: embeddings beyond the text limit, in all four modes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from services.diffusion.fitting import MODES, attention_pool, fit, interpolate, pool, text_limit, truncate
from shared.schemas.fields import LongPromptMode

LIMIT, WIDTH = 32, 8
modes = st.sampled_from(list(LongPromptMode))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def rows(tokens: int, *, width: int = WIDTH, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("positions", "limit"), [(1536, 1504), (1024, 992), (1538, 1536), (1537, 1504), (34, 32), (33, 0)]
)
def test_the_text_limit(positions: int, limit: int) -> None:
    assert text_limit(positions) == limit
    assert limit % 32 == 0
    assert limit + 1 < positions  # the image stands one behind the padded text, and positions count from 0
    assert limit + 32 + 1 >= positions


def test_every_mode_has_its_function() -> None:
    assert set(MODES) == set(LongPromptMode)
    assert len(set(MODES.values())) == 4


@given(modes, dtypes, st.integers(1, LIMIT))
def test_what_fits_is_not_touched(mode: LongPromptMode, dtype: torch.dtype, tokens: int) -> None:
    embeddings = rows(tokens, dtype=dtype)
    assert fit(embeddings, LIMIT, mode) is embeddings


@given(modes, dtypes, st.integers(LIMIT + 1, 300), st.sampled_from([32, 64, 96]), st.integers(0, 99))
def test_shape_dtype_and_finite_numbers(
    mode: LongPromptMode, dtype: torch.dtype, tokens: int, limit: int, seed: int
) -> None:
    embeddings = rows(tokens, seed=seed, dtype=dtype)
    before = embeddings.clone()
    fitted = fit(embeddings, limit, mode)
    assert fitted.shape == (min(tokens, limit), WIDTH)
    assert fitted.dtype == dtype
    assert bool(torch.isfinite(fitted).all())
    assert torch.equal(embeddings, before)
    assert torch.equal(fit(embeddings, limit, mode), fitted)


@given(modes, st.integers(LIMIT + 1, 300), st.integers(0, 99))
def test_no_number_leaves_the_range_of_its_column(mode: LongPromptMode, tokens: int, seed: int) -> None:
    embeddings = rows(tokens, seed=seed)
    fitted = fit(embeddings, LIMIT, mode)
    assert bool((fitted <= embeddings.max(0).values + 1e-5).all())
    assert bool((fitted >= embeddings.min(0).values - 1e-5).all())


@given(modes, st.integers(LIMIT + 1, 300))
def test_equal_tokens_stay_as_they_are(mode: LongPromptMode, tokens: int) -> None:
    row = rows(1)
    torch.testing.assert_close(fit(row.expand(tokens, WIDTH), LIMIT, mode), row.expand(LIMIT, WIDTH))


@given(modes, st.integers(LIMIT + 1, 200), st.integers(0, 99))
def test_the_order_of_tokens_is_kept(mode: LongPromptMode, tokens: int, seed: int) -> None:
    rising = torch.arange(tokens, dtype=torch.float32)[:, None] + rows(1, width=3, seed=seed)
    fitted = fit(rising, LIMIT, mode)
    assert bool((fitted.diff(dim=0) > 0).all())


def test_truncate_keeps_the_first_tokens() -> None:
    embeddings = rows(100)
    assert torch.equal(truncate(embeddings, LIMIT), embeddings[:LIMIT])


@given(st.integers(LIMIT + 1, 2000), st.integers(0, 99), dtypes)
def test_interpolate_keeps_the_ends(tokens: int, seed: int, dtype: torch.dtype) -> None:
    embeddings = rows(tokens, width=3, seed=seed, dtype=dtype)
    fitted = interpolate(embeddings, LIMIT)
    assert torch.equal(fitted[0], embeddings[0])
    torch.testing.assert_close(fitted[-1], embeddings[-1])


def test_interpolate_is_linear_between_neighbours() -> None:
    embeddings = rows(63)
    fitted = interpolate(embeddings, LIMIT)  # (63 - 1) / (32 - 1) = 2: every second token
    torch.testing.assert_close(fitted, embeddings[::2])
    between = interpolate(rows(4), 3)  # at 0, 1.5 and 3
    torch.testing.assert_close(between[1], (rows(4)[1] + rows(4)[2]) / 2)


@given(st.integers(LIMIT + 1, 400), st.integers(0, 99))
def test_pool_is_torchs_adaptive_average(tokens: int, seed: int) -> None:
    embeddings = rows(tokens, seed=seed)
    expected = functional.adaptive_avg_pool1d(embeddings.T[None], LIMIT)[0].T
    assert torch.equal(pool(embeddings, LIMIT), expected)
    windows = [embeddings[i * tokens // LIMIT : -(-(i + 1) * tokens // LIMIT)].mean(0) for i in range(LIMIT)]
    torch.testing.assert_close(pool(embeddings, LIMIT), torch.stack(windows))


@given(st.integers(LIMIT + 1, 400), st.integers(0, 99))
def test_attention_pool_weighs_the_tokens_of_its_window(tokens: int, seed: int) -> None:
    """The formula of the docstring, written out window by window."""
    embeddings = rows(tokens, seed=seed)
    expected = []
    for i in range(LIMIT):
        window = embeddings[i * tokens // LIMIT : -(-(i + 1) * tokens // LIMIT)]
        salience = 1 - functional.cosine_similarity(window, window.mean(0, keepdim=True), dim=-1)
        expected.append((salience * len(window) ** 0.5).softmax(0) @ window)
    torch.testing.assert_close(attention_pool(embeddings, LIMIT), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_attention_pool_is_not_pool_where_tokens_vary() -> None:
    embeddings = rows(100)
    assert not torch.allclose(attention_pool(embeddings, LIMIT), pool(embeddings, LIMIT), atol=1e-3)


def test_attention_pool_gives_a_rare_token_more_weight() -> None:
    embeddings = rows(1).repeat(320, 1)
    embeddings[5] = -embeddings[5]  # alone in the first window of ten
    rare, common = embeddings[5], embeddings[0]
    weighed, mean = attention_pool(embeddings, LIMIT)[0], pool(embeddings, LIMIT)[0]
    assert torch.dist(weighed, rare) < torch.dist(mean, rare)
    torch.testing.assert_close(attention_pool(embeddings, LIMIT)[1], common)


def test_zeros_do_not_become_nan() -> None:
    for mode in LongPromptMode:
        assert torch.equal(fit(torch.zeros(100, WIDTH), LIMIT, mode), torch.zeros(LIMIT, WIDTH))


@pytest.mark.parametrize("mode", list(LongPromptMode))
def test_one_token_too_many(mode: LongPromptMode) -> None:
    assert fit(rows(1505, width=4), 1504, mode).shape == (1504, 4)
