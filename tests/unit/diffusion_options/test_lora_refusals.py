"""LoRA files that cannot be used are refused by name, before anything is changed; pickle is never read."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drawing import load, load_pipeline, same_weights, weights
from lora_files import RANK, write, write_original

from services.diffusion.lora_settings import LoraFile
from services.diffusion.loras import fuse_loras
from shared.checkpoint import UnusableModel

LAYER = "layers.0.attention.to_q"
WIDTH = 64


def pickled(folder: Path) -> Path:
    path = folder / "lora.pt"
    torch.save({f"diffusion_model.{LAYER}.lora_A.weight": torch.ones(RANK, WIDTH)}, path)
    return path


def pickle_in_disguise(folder: Path) -> Path:
    return pickled(folder).rename(folder / "lora.safetensors")


def missing(folder: Path) -> Path:
    return folder / "nowhere.safetensors"


def a_folder(folder: Path) -> Path:
    path = folder / "folder.safetensors"
    path.mkdir()
    return path


def no_bytes(folder: Path) -> Path:
    path = folder / "empty.safetensors"
    path.touch()
    return path


def no_tensors(folder: Path) -> Path:
    return write(folder / "nothing.safetensors", {})


def truncated(folder: Path) -> Path:
    path = good(folder)
    path.write_bytes(path.read_bytes()[:-7])
    return path


def cut_in_the_header(folder: Path) -> Path:
    path = good(folder)
    path.write_bytes(path.read_bytes()[:50])
    return path


def overlapping(folder: Path) -> Path:
    entry = {"dtype": "F32", "shape": [RANK, WIDTH], "data_offsets": [0, 4 * RANK * WIDTH]}
    names = [f"diffusion_model.{LAYER}.lora_{half}.weight" for half in "AB"]
    header = json.dumps(dict.fromkeys(names, entry)).encode()
    path = folder / "overlapping.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8 * RANK * WIDTH))
    return path


def good(folder: Path, **tensors: torch.Tensor) -> Path:
    base = f"diffusion_model.{LAYER}"
    pair = {f"{base}.lora_A.weight": torch.ones(RANK, WIDTH), f"{base}.lora_B.weight": torch.ones(WIDTH, RANK)}
    return write(folder / "lora.safetensors", {**pair, **{name.replace("__", "."): t for name, t in tensors.items()}})


def half_a_pair(folder: Path) -> Path:
    return write(folder / "half.safetensors", {f"transformer.{LAYER}.lora_A.weight": torch.ones(RANK, WIDTH)})


def half_a_pair_of_the_original(folder: Path) -> Path:
    return write(folder / "half.safetensors", {f"diffusion_model.{LAYER}.lora_A.weight": torch.ones(RANK, WIDTH)})


def of_another_width(folder: Path) -> Path:
    base = f"transformer.{LAYER}"
    pair = {f"{base}.lora_A.weight": torch.ones(RANK, 99), f"{base}.lora_B.weight": torch.ones(WIDTH, RANK)}
    return write(folder / "wide.safetensors", pair)


def of_two_ranks(folder: Path) -> Path:
    base = f"transformer.{LAYER}"
    pair = {f"{base}.lora_A.weight": torch.ones(RANK, WIDTH), f"{base}.lora_B.weight": torch.ones(WIDTH, 9)}
    return write(folder / "ranks.safetensors", pair)


def of_another_model(folder: Path) -> Path:
    base = "transformer.single_transformer_blocks.0.attn.to_q"
    pair = {f"{base}.lora_A.weight": torch.ones(RANK, WIDTH), f"{base}.lora_B.weight": torch.ones(WIDTH, RANK)}
    return write(folder / "flux.safetensors", pair)


def of_a_layer_too_deep(folder: Path) -> Path:
    base = "transformer.layers.29.attention.to_q"
    pair = {f"{base}.lora_A.weight": torch.ones(RANK, WIDTH), f"{base}.lora_B.weight": torch.ones(WIDTH, RANK)}
    return write(folder / "deep.safetensors", pair)


def for_the_text_encoder(folder: Path) -> Path:
    base = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    pair = {f"{base}.lora_down.weight": torch.ones(RANK, WIDTH), f"{base}.lora_up.weight": torch.ones(WIDTH, RANK)}
    return write(folder / "te.safetensors", {**pair, f"{base}.alpha": torch.tensor(1.0)})


def whole_weights(folder: Path) -> Path:
    return write(folder / "model.safetensors", {f"{LAYER}.weight": torch.ones(WIDTH, WIDTH)})


def a_stray_tensor(folder: Path) -> Path:
    return good(folder, diffusion_model__layers__0__something=torch.ones(3))


def an_odd_alpha(folder: Path) -> Path:
    return good(folder, **{f"diffusion_model__{LAYER}__alpha".replace(".", "__"): torch.ones(3)})


def not_numbers(folder: Path) -> Path:
    base = f"diffusion_model.{LAYER}"
    up = torch.full((WIDTH, RANK), torch.nan)
    return write(
        folder / "nan.safetensors", {f"{base}.lora_A.weight": torch.ones(RANK, WIDTH), f"{base}.lora_B.weight": up}
    )


def a_dora(folder: Path) -> Path:
    return good(folder, **{f"diffusion_model__{LAYER}__dora_scale".replace(".", "__"): torch.ones(WIDTH, 1)})


def a_lokr(folder: Path) -> Path:
    base = f"diffusion_model.{LAYER}"
    return write(
        folder / "lokr.safetensors", {f"{base}.lokr_w1": torch.ones(8, 8), f"{base}.lokr_w2": torch.ones(8, 8)}
    )


REFUSED: dict[Callable[[Path], Path], str] = {
    pickled: "pickled weights are never loaded",
    pickle_in_disguise: "cannot be read as safetensors",
    missing: "cannot be read: No such file",
    a_folder: "cannot be read",
    no_bytes: "cannot be read as safetensors",
    no_tensors: "is empty",
    truncated: "is truncated",
    cut_in_the_header: "cannot be read as safetensors",
    overlapping: "overlap",
    half_a_pair: "does not fit",
    half_a_pair_of_the_original: "not those of a LoRA",
    of_another_width: "does not fit",
    of_two_ranks: "does not fit",
    of_another_model: "matches no layer",
    of_a_layer_too_deep: "matches no layer",
    for_the_text_encoder: "matches no layer",
    whole_weights: "matches no layer",
    a_stray_tensor: "not those of a LoRA",
    an_odd_alpha: "not those of a LoRA",
    not_numbers: "not finite numbers",
    a_dora: "is a DoRA",
    a_lokr: "matches no layer",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_an_unusable_file_is_named(make: Callable[[Path], Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(UnusableModel, match=REFUSED[make]) as refusal:
        load(tiny_checkpoint, lora=[f"{path}:0.5"])
    assert str(refusal.value).startswith(f"the LoRA {path} ")
    assert "\n" not in str(refusal.value)


def test_the_good_file_of_these_tests_is_taken(tiny_checkpoint: Path, tmp_path: Path) -> None:
    load(tiny_checkpoint, lora=[str(good(tmp_path))])


@pytest.mark.parametrize("make", [pickled, truncated, overlapping], ids=lambda make: make.__name__)
def test_nothing_is_changed_when_a_later_file_is_broken(
    make: Callable[[Path], Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    transformer = load_pipeline(tiny_checkpoint, torch.float32).transformer
    before = weights(transformer)
    first = write_original(tmp_path, transformer)
    with pytest.raises(UnusableModel):
        fuse_loras(transformer, [LoraFile(first), LoraFile(make(tmp_path))])
    assert same_weights(weights(transformer), before)


def test_each_file_is_logged_with_its_scale(
    tiny_checkpoint: Path, tmp_path: Path, log_entries: list[dict[str, object]]
) -> None:
    path = good(tmp_path)
    load(tiny_checkpoint, lora=[f"{path}:0.25", str(path)])
    fused = [
        (entry["path"], entry["scale"], entry["layers"]) for entry in log_entries if entry["event"] == "lora fused"
    ]
    assert fused == [(str(path), 0.25, 1), (str(path), 1.0, 1)]


@pytest.mark.parametrize("make", [missing, truncated], ids=lambda make: make.__name__)
def test_no_weight_is_read_where_a_file_is_broken(
    make: Callable[[Path], Path], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.diffusion.loading._load", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(UnusableModel, match="the LoRA"):
        load(tiny_checkpoint, lora=[f"{make(tmp_path)}:0.5"])
