"""What a LoRA's metadata may say: how its change follows from its halves, and nothing that peft would make up."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing import draw, load, load_pipeline, named
from lora_files import LAYERS, RANK, with_settings, write_original

from services.diffusion import loras
from services.diffusion.model import ZImageModel
from shared.errors import InvalidField

TOLD = (("told", 1.0),)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dropout": 0.5},
        {"lora_bias": True},
        {"use_dora": True},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["cap_embedder"]},
        {"target_modules": ["to_q", "w3"]},
        {"target_modules": None},
        {"bias": "all"},
        {"of_a_later_peft": 1},
    ],
    ids=str,
)
def test_what_is_for_a_training_changes_no_picture(
    settings: dict[str, Any], tiny_checkpoint: Path, folder: Path, plain: Path
) -> None:
    with_settings(plain, folder / "told.safetensors", **settings)
    model = load(tiny_checkpoint, lora_dir=folder)
    base, expected = draw(model), draw(model, loras=(("plain", 1.0),))
    assert not np.array_equal(base, expected)
    for _ in range(2):
        assert np.array_equal(draw(model, loras=TOLD), expected)
    assert np.array_equal(draw(model), base)


@pytest.mark.parametrize("options", ["lora", "lora_dir"])
def test_no_layer_is_left_in_training(options: str, tiny_checkpoint: Path, folder: Path, plain: Path) -> None:
    model = load(tiny_checkpoint, **{options: [str(plain)] if options == "lora" else folder})
    if options == "lora_dir":
        draw(model, loras=(("plain", 1.0),))
    assert [name for name, module in model.parts.transformer.named_modules() if module.training] == []


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3},
        {"r": 0},
        {"r": "many"},
        {"lora_alpha": None},
        {"rank_pattern": {LAYERS[-1]: 3}},
        {"rank_pattern": {"(": RANK}},
        {"alpha_pattern": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("others", [(), (("ink", 1.0),)], ids=["alone", "beside another"])
def test_one_that_cannot_be_added_leaves_nothing_behind(
    settings: dict[str, Any], others: Any, tiny_checkpoint: Path, folder: Path, plain: Path, tmp_path: Path
) -> None:
    transformer = load_pipeline(tiny_checkpoint, torch.float32).transformer
    write_original(tmp_path, transformer, dtype=torch.bfloat16).rename(folder / "half.safetensors")
    with_settings(plain, folder / "told.safetensors", **settings)
    expected = draw(load(tiny_checkpoint, lora_dir=folder), loras=(("half", 1.0),))
    model = load(tiny_checkpoint, lora_dir=folder)
    draw(model, loras=others)
    there = parameters(model)
    with pytest.raises(InvalidField, match="The LoRA 'told' cannot be added to this DiT"):
        draw(model, loras=TOLD)
    assert {name.replace(".base_layer", "") for name in parameters(model)} == {
        name.replace(".base_layer", "") for name in there
    }
    assert np.array_equal(draw(model, loras=(("half", 1.0),)), expected)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_one_that_peft_cannot_fill_is_refused(model: ZImageModel, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixin, before = loras.ZImageLoraLoaderMixin, draw(model, loras=(("oil", 1.0),))
    really = mixin.load_lora_into_transformer

    def with_biases(*tensors: Any, metadata: dict[str, Any], **options: Any) -> None:
        really(*tensors, metadata={**metadata, "transformer.lora_bias": True}, **options)

    model.adapters.shelf.refresh()
    with monkeypatch.context() as later_peft:
        later_peft.setattr(mixin, "load_lora_into_transformer", with_biases)
        with pytest.raises(InvalidField, match="The LoRA 'plain' lacks tensors that its settings ask for"):
            model.adapters.load(named(model, ("plain", 1.0)))
    assert model.adapters.loaded == ["oil"]
    assert not any(parameter.is_meta for parameter in model.parts.transformer.parameters())
    assert np.array_equal(draw(model, loras=(("oil", 1.0),)), before)


def parameters(model: ZImageModel) -> set[str]:
    return {name for name, _ in model.parts.transformer.named_parameters()}
