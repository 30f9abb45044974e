"""`zimage` on the command line: what it says when it cannot start, and the demo."""

import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from servers import png_size, run, zimage

pytestmark = pytest.mark.slow


def refusal(tmp_path: Path, *arguments: str | Path) -> str:
    """The sentence with which `zimage serve` refuses to start; fails where it says it in any other way."""
    ended = run(zimage("serve", "--data-dir", tmp_path / "data", *arguments), tmp_path)
    assert ended.status not in (0, -9, -15), ended
    assert not ended.left, ended
    assert "Traceback" not in ended.stdout + ended.stderr
    assert '"exception"' not in ended.stderr
    sentences = [line for line in ended.stderr.splitlines() if line.startswith("zimage: ")]
    assert len(sentences) == 1, ended.stderr
    assert ended.stderr.splitlines()[-1] == sentences[0]
    return sentences[0]


def test_a_port_in_use(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        sentence = refusal(tmp_path, "--model-path", tiny_checkpoint, "--port", port)
    assert port in sentence
    assert "--port" in sentence


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert str(missing) in refusal(tmp_path, "--model-path", missing, "--port", "0")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    sentence = refusal(tmp_path, "--model-path", tmp_path / "pictures", "--port", "0")
    assert "is not a Z-Image model" in sentence


def test_a_model_without_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    sentence = refusal(tmp_path, "--model-path", model, "--port", "0")
    assert "safetensors" in sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--model-path", tiny_checkpoint, "--port", "0", "--text-encoder-device", "cpu", "--dit-device", "cuda")
    assert "'cuda'" in refusal(tmp_path, *flags)


def test_a_device_that_does_not_exist(tiny_checkpoint: Path, tmp_path: Path) -> None:
    ended = run(zimage("serve", "--model-path", tiny_checkpoint, "--dit-device", "banana"), tmp_path)
    assert ended.status == 2
    assert "banana" in ended.stderr
    assert "--dit-device" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_broken_lora(tiny_checkpoint: Path, tmp_path: Path) -> None:
    lora = tmp_path / "pickled.safetensors"
    torch.save({"diffusion_model.layers.0.attention.to_q.lora_A.weight": torch.ones(4, 64)}, lora)
    flags = ("--model-path", tiny_checkpoint, "--port", "0", "--text-encoder-device", "cpu", "--dit-device", "cpu")
    assert f"the LoRA {lora} " in refusal(tmp_path, *flags, "--lora", f"{lora}:0.8")


def test_demo(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    ended = run(zimage("demo", "--data-dir", data_dir, "--size", "64", "--steps", "2", "--seed", "5"), tmp_path)
    assert ended.status == 0, ended
    assert not ended.left
    (picture,) = data_dir.rglob("*.png")
    assert png_size(picture.read_bytes()) == (64, 64)
    assert f"Picture: {picture}" in ended.stdout
    for stage in ("starting", "encoder", "denoising", "VAE", "PNG"):
        assert re.search(rf"{stage}.*\d\.\d+ s", ended.stdout), ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
