"""A LoRA changes the weights, and so the picture, bit for bit as diffusers' `load_lora_weights` and `fuse_lora` do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import draw, draw_by_pipeline, load, load_pipeline, same_weights, weights
from lora_files import LAYERS, RANK, with_settings, write_diffusers, write_kohya, write_original

FORMATS = {"diffusers": write_diffusers, "kohya": write_kohya, "original": write_original}


@pytest.fixture(params=["float32", "bfloat16"])
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Path, tiny_checkpoint_bf16: Path) -> Path:
    return tiny_checkpoint if request.param == "float32" else tiny_checkpoint_bf16


@pytest.fixture
def dtype(checkpoint: Path, tiny_checkpoint: Path) -> torch.dtype:
    return torch.float32 if checkpoint == tiny_checkpoint else torch.bfloat16


def fused_by_diffusers(checkpoint: Path, dtype: torch.dtype, *loras: tuple[Path, float]) -> Any:
    pipeline = load_pipeline(checkpoint, dtype)
    for path, scale in loras:
        pipeline.load_lora_weights(path.parent, weight_name=path.name, use_safetensors=True)
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    return pipeline


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("scale", [1.0, 0.8, -0.5])
def test_each_format_as_diffusers_fuses_it(
    make: Callable[[Path, Any], Path], scale: float, checkpoint: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = make(tmp_path, load_pipeline(checkpoint, dtype).transformer)
    pipeline = fused_by_diffusers(checkpoint, dtype, (path, scale))
    model = load(checkpoint, lora=[f"{path}:{scale}"])
    assert same_weights(weights(model._transformer), weights(pipeline.transformer))
    assert (draw(model) == draw_by_pipeline(pipeline)).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"lora_alpha": 2, "alpha_pattern": {"to_q": 8, LAYERS[-1]: 1}},
        {"r": 2, "rank_pattern": dict.fromkeys(LAYERS, RANK)},
    ],
    ids=str,
)
def test_settings_of_peft_as_diffusers_reads_them(
    settings: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    plain = write_diffusers(tmp_path, load_pipeline(tiny_checkpoint, torch.float32).transformer)
    path = with_settings(plain, tmp_path / "told.safetensors", **settings)
    pipeline = fused_by_diffusers(tiny_checkpoint, torch.float32, (path, 0.8))
    told, other = (load(tiny_checkpoint, lora=[f"{lora}:0.8"])._transformer for lora in (path, plain))
    assert same_weights(weights(told), weights(pipeline.transformer))
    assert same_weights(weights(told), weights(other)) == ("rank_pattern" in settings)


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_the_picture_changes(make: Callable[[Path, Any], Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = load(tiny_checkpoint)
    path = make(tmp_path, load_pipeline(tiny_checkpoint, torch.float32).transformer)
    fused = load(tiny_checkpoint, lora=[str(path)])
    changed = {
        name
        for name, tensor in weights(fused._transformer).items()
        if not torch.equal(tensor, weights(base._transformer)[name])
    }
    assert changed == {f"{name}.weight" for name in LAYERS}
    assert abs(draw(fused) - draw(base)).max() > 3


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_files_of_any_number_format(stored: torch.dtype, checkpoint: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    path = write_kohya(tmp_path, load_pipeline(checkpoint, dtype).transformer, dtype=stored)
    pipeline = fused_by_diffusers(checkpoint, dtype, (path, 0.7))
    assert same_weights(weights(load(checkpoint, lora=[f"{path}:0.7"])._transformer), weights(pipeline.transformer))


def test_several_are_fused_in_order(checkpoint: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    transformer = load_pipeline(checkpoint, dtype).transformer
    one, two = (write_original(tmp_path, transformer, seed=seed) for seed in (0, 1))
    pipeline = fused_by_diffusers(checkpoint, dtype, (one, 0.8), (two, -0.5))
    by_flag = load(checkpoint, lora=[f"{one}:0.8", f"{two}:-0.5"])
    by_file = load(checkpoint, lora_paths=[one, two], lora_scales=[0.8, -0.5])
    for model in (by_flag, by_file):
        assert same_weights(weights(model._transformer), weights(pipeline.transformer))
        assert (draw(model) == draw_by_pipeline(pipeline)).all()


def test_scale_zero_is_the_base_picture(checkpoint: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    path = write_original(tmp_path, load_pipeline(checkpoint, dtype).transformer)
    model, base = load(checkpoint, lora=[f"{path}:0"]), load(checkpoint)
    assert same_weights(weights(model._transformer), weights(base._transformer))
    assert (draw(model) == draw(base)).all()


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_without_options_the_picture_is_the_pipelines(checkpoint: Path, dtype: torch.dtype, guidance: float) -> None:
    pipeline = load_pipeline(checkpoint, dtype)
    assert (draw(load(checkpoint), guidance=guidance) == draw_by_pipeline(pipeline, guidance=guidance)).all()
