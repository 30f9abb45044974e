"""`shared.checkpoint`: what is said of a directory that cannot be used, without loading anything."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.checkpoint import (
    UnusableModel,
    checkpoint_dtype,
    read_json,
    require_parts,
    require_weights,
    weight_headers,
)

PARTS = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")


@pytest.fixture
def broken(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def test_a_whole_checkpoint(tiny_checkpoint: Path) -> None:
    assert require_parts(tiny_checkpoint, *PARTS) == tiny_checkpoint
    for part in ("text_encoder", "transformer", "vae"):
        require_weights(tiny_checkpoint / part)


def test_the_directory_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnusableModel, match=r"/gone does not exist"):
        require_parts(tmp_path / "gone", "vae")


def test_the_directory_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UnusableModel, match="does not exist"):
        require_parts(tmp_path / "file", "vae")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_missing(broken: Path, part: str) -> None:
    shutil.rmtree(broken / part)
    with pytest.raises(UnusableModel, match=f"its folder '{part}' is missing"):
        require_parts(broken, *PARTS)


def test_a_part_without_a_configuration(broken: Path) -> None:
    (broken / "vae" / "config.json").unlink()
    with pytest.raises(UnusableModel, match="'vae' is missing or has no configuration"):
        require_parts(broken, "vae")


def test_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(UnusableModel, match="is not a Z-Image model"):
        require_parts(tmp_path, "transformer")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.safetensors.index.json"])
def test_weights_that_are_pickled_or_absent(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UnusableModel, match=r"holds no \.safetensors weights; pickled"):
        require_weights(tmp_path)


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@pytest.mark.parametrize("kept", [0, 7, 8, 100])
def test_a_file_that_ends_within_its_header(broken: Path, kept: int) -> None:
    path = weights_of(broken / "vae")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UnusableModel, match="cannot be read as safetensors") as refused:
        require_weights(broken / "vae")
    assert str(path) in str(refused.value)


def test_a_truncated_file(broken: Path) -> None:
    path = weights_of(broken / "transformer")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UnusableModel, match=f"is truncated: {len(whole) - 1} bytes instead of {len(whole)}"):
        require_weights(broken / "transformer")


def test_a_file_that_is_too_long(broken: Path) -> None:
    path = weights_of(broken / "vae")
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0")
    with pytest.raises(UnusableModel, match=f"is too long: {len(whole) + 1} bytes instead of {len(whole)}"):
        require_weights(broken / "vae")


def test_pickle_under_the_name_of_safetensors(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UnusableModel, match="cannot be read as safetensors"):
        require_weights(tmp_path)


def test_one_broken_shard_among_good_ones(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save_file({f"t{number}": torch.ones(4)}, tmp_path / f"model-0000{number}-of-00003.safetensors")
    assert [header.tensors[0].name for header in weight_headers(tmp_path)] == ["t1", "t2", "t3"]
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(UnusableModel, match="00002"):
        require_weights(tmp_path)


def test_a_shard_that_the_index_names_is_missing(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(UnusableModel, match=r"is not complete: model-2\.safetensors is missing"):
        require_weights(tmp_path)
    index.write_text('{"weight_map": []}')
    with pytest.raises(UnusableModel, match="does not say which file"):
        require_weights(tmp_path)


def test_the_dtype_of_a_checkpoint(tiny_checkpoint: Path, tiny_checkpoint_bf16: Path) -> None:
    for part in ("text_encoder", "transformer", "vae"):
        assert checkpoint_dtype(tiny_checkpoint / part) == "float32"
        assert checkpoint_dtype(tiny_checkpoint_bf16 / part) == "bfloat16"


def test_the_majority_of_bytes_decides(tmp_path: Path) -> None:
    save_file({"norm": torch.ones(8), "a": torch.ones(64, dtype=torch.bfloat16)}, tmp_path / "model-1.safetensors")
    assert checkpoint_dtype(tmp_path) == "bfloat16"
    save_file({"b": torch.ones(512, dtype=torch.float16)}, tmp_path / "model-2.safetensors")
    assert checkpoint_dtype(tmp_path) == "float16"
    save_file({"ids": torch.ones(10_000, dtype=torch.int64)}, tmp_path / "model-3.safetensors")
    assert checkpoint_dtype(tmp_path) == "float16"


def test_without_floats_the_dtype_is_float32(tmp_path: Path) -> None:
    save_file({"ids": torch.ones(4, dtype=torch.int64)}, tmp_path / "model.safetensors")
    assert checkpoint_dtype(tmp_path) == "float32"
    assert checkpoint_dtype(tmp_path / "gone") == "float32"


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(UnusableModel, match=r"config\.json is missing or is not JSON"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(UnusableModel, match="is not JSON"):
        read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UnusableModel, match="is not JSON"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(UnusableModel, match="does not hold a JSON object"):
        read_json(path)
    path.write_text(json.dumps({"shift": 3.0}))
    assert read_json(path) == {"shift": 3.0}
