"""Weights that do not fit into a device's memory are refused before they are loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import load, load_pipeline

from services.diffusion.memory import require_room
from services.diffusion.option_settings import OffloadMode
from services.diffusion.settings import DiffusionSettings
from services.encoder.model import load_text_encoder
from services.encoder.settings import EncoderSettings
from shared import tensors
from shared.checkpoint import UnusableModel, weight_bytes
from shared.settings import Quantization
from shared.tensors import bytes_of, free_memory, host_memory, loaded_bytes, require_memory

CUDA = torch.device("cuda")
MEMINFO = "MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:    8000000 kB\nHugePages_Total:  0\n"


def parameter_bytes(checkpoint: Path, dtype: torch.dtype) -> int:
    transformer = load_pipeline(checkpoint, dtype).transformer
    return sum(weight.numel() * weight.element_size() for weight in transformer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_is_that_of_the_loaded_weights(
    tiny_checkpoint: Path, tiny_checkpoint_bf16: Path, dtype: torch.dtype
) -> None:
    for checkpoint in (tiny_checkpoint, tiny_checkpoint_bf16):
        assert weight_bytes(checkpoint / "transformer", dtype.itemsize) == parameter_bytes(checkpoint, dtype)


def test_both_figures_and_the_advice_are_in_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "free_memory", lambda _: 3_140_000_000)
    with pytest.raises(UnusableModel) as refusal:
        require_memory(CUDA, 12_310_000_000, what="the DiT", advice="free some of it")
    assert str(refusal.value) == ("the DiT takes 12.3 GB, but the device 'cuda' has only 3.14 GB free: free some of it")
    require_memory(CUDA, 3_140_000_000, what="the DiT", advice="")


def test_weights_in_fewer_bits_need_less(tiny_checkpoint_bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="the extra `quantization` is not installed")
    folder = tiny_checkpoint_bf16 / "transformer"
    whole, kept = (loaded_bytes(folder, torch.bfloat16, kind) for kind in (Quantization.NONE, Quantization.INT8))
    assert whole == weight_bytes(folder, 2)
    assert whole / 2 < kept < 0.6 * whole
    taken = sum(map(bytes_of, load(tiny_checkpoint_bf16, quantization="int8").parts.transformer.parameters()))
    assert whole / 2 < taken < whole, "the size is that of the bits, not of what they stand for"


def test_where_nothing_is_known_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "free_memory", lambda _: None)
    require_memory(CUDA, 1 << 60, what="the DiT", advice="")


def test_diffusion_refuses(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(weight_bytes(tiny_checkpoint / part, 4) for part in ("transformer", "vae"))
    monkeypatch.setattr(tensors, "free_memory", lambda _: needed - 1)
    with pytest.raises(
        UnusableModel,
        match=r"^the DiT and the VAE of .* GB, but the device 'cpu' has only .* GB free: free some of it, or choose",
    ):
        load(tiny_checkpoint)
    load(tiny_checkpoint, diffusion_dtype="bfloat16")


def test_the_text_encoder_refuses(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "free_memory", lambda _: 1000)
    with pytest.raises(UnusableModel, match=r"the text encoder of .* has only 1e-06 GB free: .*--text-encoder-device"):
        load_text_encoder(EncoderSettings(model_path=tiny_checkpoint, text_encoder_device="cpu"))


def test_offloaded_weights_need_main_memory(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda": 1000, "cpu": 1 << 40}
    monkeypatch.setattr(tensors, "free_memory", lambda device: free[device.type])
    settings = DiffusionSettings(model_path=tiny_checkpoint, vae_device="cpu")
    with pytest.raises(UnusableModel, match=r"^the DiT of .* keep the DiT in main memory with --cpu-offload"):
        require_room(tiny_checkpoint, settings, CUDA)
    require_room(tiny_checkpoint, settings.model_copy(update={"cpu_offload": True}), CUDA)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A machine with a GPU, and what its devices have free."""
    free = {"cuda": 1 << 40, "cpu": 1 << 40}
    monkeypatch.setattr(tensors, "free_memory", lambda device: free[device.type])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return free


def whole_offloaded(checkpoint: Path, **options: Any) -> DiffusionSettings:
    return DiffusionSettings(model_path=checkpoint, cpu_offload=True, offload_mode="model", **options)


@pytest.mark.parametrize("vae_device", ["cuda", "cpu"])
def test_a_dit_that_is_offloaded_as_a_whole_must_fit_the_device(
    tiny_checkpoint: Path, gpu: dict[str, int], vae_device: str
) -> None:
    """The VAE, which comes in turns with it, need not fit beside it."""
    settings = whole_offloaded(tiny_checkpoint, vae_device=vae_device)
    gpu["cuda"] = weight_bytes(tiny_checkpoint / "transformer", 2)
    require_room(tiny_checkpoint, settings, CUDA)
    gpu["cuda"] -= 1
    with pytest.raises(
        UnusableModel, match=r"^the DiT of .* 'cuda' has only .* free: .* set optimization.offload_mode to 'group', or"
    ):
        require_room(tiny_checkpoint, settings, CUDA)
    gpu["cuda"] = weight_bytes(tiny_checkpoint / "vae", 2)
    require_room(tiny_checkpoint, settings.model_copy(update={"offload_mode": OffloadMode.GROUP}), CUDA)


def test_so_must_a_vae_that_is_larger(
    tiny_checkpoint: Path, gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"transformer": 1000, "vae": 2000}
    monkeypatch.setattr("services.diffusion.memory.part_bytes", lambda folder, _: sizes[folder.name])
    gpu["cuda"] = 1999
    with pytest.raises(UnusableModel, match=r"^the VAE of .* 'cuda'"):
        require_room(tiny_checkpoint, whole_offloaded(tiny_checkpoint, vae_device="cuda"), CUDA)


def test_what_comes_in_turns_needs_main_memory_together(tiny_checkpoint: Path, gpu: dict[str, int]) -> None:
    gpu["cpu"] = sum(weight_bytes(tiny_checkpoint / part, 2) for part in ("transformer", "vae"))
    settings = whole_offloaded(tiny_checkpoint, vae_device="cuda")
    require_room(tiny_checkpoint, settings, CUDA)
    gpu["cpu"] -= 1
    with pytest.raises(UnusableModel, match=r"^the DiT and the VAE of .* 'cpu'"):
        require_room(tiny_checkpoint, settings, CUDA)


def test_this_machines_memory_is_known_or_not_but_never_negative() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or free > 0


def test_main_memory_is_what_linux_calls_available(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert host_memory(tmp_path / "meminfo", tmp_path) == 8_000_000 * 1024


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    assert host_memory(tmp_path / "meminfo", tmp_path) == 1_000_000_000
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000000\nactive_file 100000000\n")
    assert host_memory(tmp_path / "meminfo", tmp_path) == 1_600_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path / "meminfo", tmp_path) == 8_000_000 * 1024


def test_elsewhere_main_memory_is_not_known(tmp_path: Path) -> None:
    assert host_memory(tmp_path / "meminfo", tmp_path) is None
