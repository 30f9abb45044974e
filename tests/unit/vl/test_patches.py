"""Patches in rows against transformers' own embedding of them, bit for bit."""

from typing import Any

import pytest
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchEmbed

from services.vl.patches import FEWEST, NARROWEST, PatchesInRows, embed_rows, in_rows

NUMBERS = 3 * 2 * 16 * 16


def embedding(dtype: torch.dtype = torch.float32, width: int = 128) -> Any:
    torch.manual_seed(3)
    return Qwen3VLVisionPatchEmbed(Qwen3VLVisionConfig(hidden_size=width, patch_size=16)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [4, FEWEST, FEWEST + 4, 1000])
@torch.inference_mode()
def test_no_bit_is_changed(dtype: torch.dtype, count: int) -> None:
    """Whether rows are used where it is `in_rows` that decides it: on another processor they may not be equal."""
    theirs = embedding(dtype)
    ours = in_rows(theirs)
    patches = torch.randn(count, NUMBERS)
    expected = theirs(patches)
    assert expected.dtype == dtype
    assert torch.equal(ours(patches), expected)


@torch.inference_mode()
def test_rows_are_used_where_they_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = embedding()
    monkeypatch.setattr("services.vl.patches.embed_rows", lambda patches, _: theirs(patches))
    assert isinstance(in_rows(theirs), PatchesInRows)


@torch.inference_mode()
def test_rows_that_end_early_are_filled_up() -> None:
    theirs = embedding()
    patches = torch.randn(FEWEST + 1, NUMBERS)
    assert torch.allclose(embed_rows(patches, theirs.proj), theirs(patches), atol=1e-5)


@torch.inference_mode()
def test_other_arithmetic_keeps_the_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = embedding()
    monkeypatch.setattr("services.vl.patches.embed_rows", lambda patches, _: theirs(patches) + 1e-6)
    assert in_rows(theirs) is theirs


def test_narrow_models_keep_the_own_way() -> None:
    theirs = embedding(width=NARROWEST - 16)
    assert in_rows(theirs) is theirs
