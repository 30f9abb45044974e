"""Blending: what each mode gives, on tensors."""

import pytest
import torch
from fakes import TEXT_WIDTH, embeddings
from torch.nn import functional

from services.diffusion import blending
from services.diffusion.blending import OUTLIER_FACTOR, blend, mask_outliers, resample, token_salience
from shared.schemas.diffusion import Blending
from shared.schemas.fields import BlendMode, OutlierMasking

TEXT, REFERENCE = embeddings(18), 3 * embeddings(90, seed=2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def how(
    mode: BlendMode = BlendMode.LINEAR,
    *alphas: float,
    share: float = 1 / 3,
    masking: OutlierMasking = OutlierMasking.OFF,
) -> Blending:
    return Blending(mode=mode, alphas=list(alphas), style_share=share, outlier_masking=masking)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", BlendMode)
def test_alpha_0_is_the_text_bit_for_bit(mode: BlendMode, dtype: torch.dtype) -> None:
    text = torch.cat([TEXT, torch.full((1, TEXT_WIDTH), -0.0)]).to(dtype)
    blended = blend(text, [REFERENCE], how(mode, 0.0))
    assert blended.dtype is dtype
    assert torch.equal(blended.view(torch.uint8), text.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 18, 90, 200])
def test_alpha_1_in_linear_is_the_resampled_reference(tokens: int, dtype: torch.dtype) -> None:
    text = embeddings(tokens, dtype=dtype)
    rows = REFERENCE.T.unsqueeze(0)
    expected = functional.interpolate(rows, size=tokens, mode="linear", align_corners=True)[0].T
    assert torch.equal(blend(text, [REFERENCE], how(BlendMode.LINEAR, 1.0)), expected.to(dtype))


def test_a_reference_of_the_text_s_length_is_not_changed() -> None:
    assert resample(TEXT, 18) is TEXT


def test_linear_is_the_weighted_mean() -> None:
    expected = 0.7 * TEXT + 0.3 * resample(REFERENCE, 18)
    torch.testing.assert_close(blend(TEXT, [REFERENCE], how(BlendMode.LINEAR, 0.3)), expected)


@pytest.mark.parametrize(("share", "last"), [(1 / 3, 21), (0.5, 32), (1.0, 64), (0.001, 1)])
def test_style_only_leaves_the_first_dimensions(share: float, last: int) -> None:
    blended = blend(TEXT, [REFERENCE], how(BlendMode.STYLE_ONLY, 0.6, share=share))
    linear = blend(TEXT, [REFERENCE], how(BlendMode.LINEAR, 0.6))
    assert torch.equal(blended[:, : TEXT_WIDTH - last], TEXT[:, : TEXT_WIDTH - last])
    assert torch.equal(blended[:, TEXT_WIDTH - last :], linear[:, TEXT_WIDTH - last :])


def test_graduated_rises_along_the_sequence() -> None:
    weights = blending.graduated(TEXT, how(BlendMode.GRADUATED, 0.8))[:, 0]
    assert (weights[0], weights[-1]) == (0, pytest.approx(0.8))
    assert bool((weights.diff() > 0).all())
    torch.testing.assert_close(weights.diff(), torch.full((17,), 0.8 / 17))
    blended = blend(TEXT, [REFERENCE], how(BlendMode.GRADUATED, 0.8))
    assert torch.equal(blended[0], TEXT[0])


def test_attention_weighted_spares_tokens_that_stand_out() -> None:
    text = embeddings(1).repeat(12, 1) + 0.01 * embeddings(12, seed=5)
    text[6] = -text[6]
    salience = token_salience(text)
    assert salience.argmax() == 6
    weights = blending.attention_weighted(text, how(BlendMode.ATTENTION_WEIGHTED, 0.8))[:, 0]
    assert weights.argmin() == 6
    assert weights.argmax() not in (4, 5, 7, 8)  # its neighbours differ from it too
    assert 0 < weights.min() < 0.2
    assert weights.max() <= 0.8


def test_attention_weighted_leaves_little_of_tokens_that_do_not_stand_out() -> None:
    """Alpha 1 is the reference alone but for those tokens that the mode is there to spare."""
    common, other = embeddings(1)[0], embeddings(1, seed=7)[0]
    text = common + 0.3 * embeddings(40, seed=5)
    text[20] = other
    salience = token_salience(text)
    relative = salience / salience.mean()
    weights = blending.attention_weighted(text, how(BlendMode.ATTENTION_WEIGHTED, 1.0))[:, 0]
    assert relative[20] > 4
    assert weights[20] < 1 / 17
    assert bool((weights[relative < 1] > 0.94).all())
    assert bool((weights.argsort() == relative.argsort(descending=True)).all())
    apart = (blend(text, [REFERENCE], how(BlendMode.ATTENTION_WEIGHTED, 1.0)) - resample(REFERENCE, 40)).norm(dim=1)
    whole = (text - resample(REFERENCE, 40)).norm(dim=1)
    torch.testing.assert_close(apart / whole, 1 - weights)


@pytest.mark.parametrize(
    "text", [TEXT, embeddings(1), embeddings(2), embeddings(1).repeat(9, 1), torch.zeros(4, TEXT_WIDTH)]
)
def test_attention_weighted_is_never_linear(text: torch.Tensor) -> None:
    blended = blend(text, [REFERENCE], how(BlendMode.ATTENTION_WEIGHTED, 0.6))
    assert bool(torch.isfinite(blended).all())
    assert not torch.allclose(blended, blend(text, [REFERENCE], how(BlendMode.LINEAR, 0.6)))


@pytest.mark.parametrize("mode", BlendMode)
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_more_alpha_comes_closer_to_the_reference(mode: BlendMode, tokens: int) -> None:
    text = embeddings(tokens)
    goal = resample(REFERENCE, tokens)
    apart = [(blend(text, [REFERENCE], how(mode, alpha)) - goal).norm() for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < apart[0]


def test_several_references_weigh_as_much_as_their_alphas() -> None:
    other = embeddings(40, seed=9)
    expected = 0.5 * TEXT + 0.3 * resample(REFERENCE, 18) + 0.2 * resample(other, 18)
    torch.testing.assert_close(blend(TEXT, [REFERENCE, other], how(BlendMode.LINEAR, 0.3, 0.2)), expected)
    alone = blend(TEXT, [REFERENCE], how(BlendMode.STYLE_ONLY, 0.5))
    torch.testing.assert_close(blend(TEXT, [REFERENCE, other], how(BlendMode.STYLE_ONLY, 0.5, 0.0)), alone)
    assert torch.equal(blend(TEXT, [REFERENCE, other], how(BlendMode.LINEAR, 0.0, 0.0)), TEXT)


def test_without_references_the_text_stays() -> None:
    assert blend(TEXT, [], how(BlendMode.LINEAR, 0.5)) is TEXT


@pytest.mark.parametrize("masking", [OutlierMasking.ZERO, OutlierMasking.CLAMP, OutlierMasking.SCALE])
def test_outliers_are_made_harmless_and_nothing_else(masking: OutlierMasking) -> None:
    reference = embeddings(18, seed=4)
    reference[:, 5] = 1000 * embeddings(18, seed=6)[:, 5]
    masked = mask_outliers(reference, TEXT, masking)
    others = [index for index in range(TEXT_WIDTH) if index != 5]
    assert torch.equal(masked[:, others], reference[:, others])
    spread = masked[:, 5].std(correction=0)
    text_spread = torch.maximum(TEXT.std(0, correction=0), TEXT.std(0, correction=0).median())[5]
    match masking:
        case OutlierMasking.ZERO:
            assert not masked[:, 5].any()
        case OutlierMasking.CLAMP:
            limit = OUTLIER_FACTOR * text_spread
            assert bool(((masked[:, 5] - TEXT[:, 5].mean()).abs() <= limit * 1.001).all())
        case _:
            assert spread == pytest.approx(text_spread.item(), rel=1e-3)
            assert masked[:, 5].mean() == pytest.approx(TEXT[:, 5].mean().item(), abs=1e-3)


@pytest.mark.parametrize("tokens", [1, 2, 18])
@pytest.mark.parametrize("masking", OutlierMasking)
def test_masking_stays_finite_for_any_length(masking: OutlierMasking, tokens: int) -> None:
    for text in (embeddings(tokens), torch.zeros(tokens, TEXT_WIDTH)):
        blended = blend(text, [1e4 * REFERENCE], how(BlendMode.LINEAR, 0.5, masking=masking))
        assert bool(torch.isfinite(blended).all())


def test_masking_off_is_no_masking() -> None:
    reference = 1000 * embeddings(18, seed=4)
    assert torch.equal(mask_outliers(reference, TEXT, OutlierMasking.OFF), reference)
