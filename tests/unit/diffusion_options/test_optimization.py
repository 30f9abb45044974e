"""Offloaded weights, Flash Attention and compiled blocks: the same picture, or one sentence that says what to do."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from drawing import draw, load, load_pipeline
from torch.nn import functional

from services.diffusion.model import ZImageModel
from services.diffusion.optimization import FLASH_BACKENDS, offload, use_flash_attention
from shared.checkpoint import UnusableModel
from shared.device_thread import EXIT_UNUSABLE_MODEL

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class TestOffload:
    """On this machine the device that the weights are brought to is the CPU too: all but the copying is real."""

    @pytest.mark.parametrize("guidance", [0.0, 2.5])
    def test_the_picture_is_the_same(self, tiny_checkpoint: Path, guidance: float) -> None:
        model, plain = load(tiny_checkpoint), load(tiny_checkpoint)
        offload(model._transformer, CPU)
        for tokens in (20, 70):
            offloaded = draw(model, guidance=guidance, tokens=tokens)
            assert (offloaded == draw(plain, guidance=guidance, tokens=tokens)).all()

    def test_the_device_is_the_one_that_computes(self, tiny_checkpoint: Path) -> None:
        transformer = load_pipeline(tiny_checkpoint, torch.float32).transformer
        transformer.enable_group_offload(onload_device=CUDA, offload_type="block_level", num_blocks_per_group=1)
        assert transformer.device.type == "cuda"
        assert next(transformer.parameters()).device.type == "cpu"

    def test_on_the_cpu_it_is_only_a_warning(self, tiny_checkpoint: Path, log_entries: list[Any]) -> None:
        model = load(tiny_checkpoint, cpu_offload=True)
        warnings = [entry["event"] for entry in log_entries if entry["log_level"] == "warning"]
        assert warnings == ["--cpu-offload changes nothing: the DiT runs on the CPU already"]
        assert (draw(model) == draw(load(tiny_checkpoint))).all()


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """What flash-attn's function computes, [batch, tokens, heads, width], without its kernel."""
    assert options.pop("causal") is False
    states = functional.scaled_dot_product_attention(*(states.transpose(1, 2) for states in (q, k, v)))
    return states.transpose(1, 2)


class TestFlashAttention:
    def test_it_needs_cuda(self, tiny_checkpoint_bf16: Path) -> None:
        with pytest.raises(UnusableModel, match="--flash-attn needs an NVIDIA GPU, but the DiT runs on 'cpu': "):
            load(tiny_checkpoint_bf16, flash_attn=True)

    def test_it_needs_bfloat16(self, tiny_checkpoint: Path) -> None:
        transformer = load_pipeline(tiny_checkpoint, torch.float32).transformer
        with pytest.raises(UnusableModel, match=r"weights are float32: set ZIMAGE_DIFFUSION_DTYPE=bfloat16 or"):
            use_flash_attention(transformer, CUDA)

    def test_it_needs_the_package(self, tiny_checkpoint_bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
        monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", False)
        transformer = load_pipeline(tiny_checkpoint_bf16, torch.bfloat16).transformer
        with pytest.raises(UnusableModel, match=r"flash-attn 2\.6\.3 or newer: install it with `uv pip install") as no:
            use_flash_attention(transformer, CUDA)
        assert "\n" not in str(no.value)

    def test_diffusers_knows_the_names(self) -> None:
        assert {backend.value for backend in attention_dispatch.AttentionBackendName} >= set(FLASH_BACKENDS)

    @pytest.mark.usefixtures("restored_backend")
    @pytest.mark.parametrize(("guidance", "negative"), [(0.0, 40), (2.5, 20), (2.5, 40)])
    def test_it_draws_the_same_without_masks(
        self, tiny_checkpoint_bf16: Path, monkeypatch: pytest.MonkeyPatch, guidance: float, negative: int
    ) -> None:
        plain = load(tiny_checkpoint_bf16)
        expected = draw(plain, guidance=guidance, negative_tokens=negative)
        monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", True)
        monkeypatch.setattr(attention_dispatch, "flash_attn_func", flash_attention)
        use_flash_attention(plain._transformer, CUDA)
        model = ZImageModel(plain._transformer, plain._vae, dict(plain._scheduler_config), takes_masks=False)
        picture = draw(model, guidance=guidance, negative_tokens=negative)
        assert abs(picture - expected).max() <= (0 if negative == 20 or not guidance else 8)


class TestCompile:
    def test_it_needs_a_compiler(self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "/nowhere/g++")
        with pytest.raises(UnusableModel, match=r"/nowhere/g\+\+ is not on this machine: install one \(`apt install"):
            load(tiny_checkpoint, compile=True)

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    @pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own parts
    @pytest.mark.usefixtures("fresh_compiler")
    def test_the_picture_differs_by_rounding(self, tiny_checkpoint: Path) -> None:
        model, plain = load(tiny_checkpoint, compile=True), load(tiny_checkpoint)
        counters = torch._dynamo.utils.counters
        compiled = counters["stats"]["unique_graphs"]
        assert compiled == 2  # the block with and without modulation, compiled before the first picture
        for case in ({}, {"tokens": 70}, {"height": 128}, {"height": 144, "tokens": 96}):
            assert abs(draw(model, **case) - draw(plain, **case)).max() <= 1
        assert counters["stats"]["unique_graphs"] == compiled, "another size must not compile again"
        assert abs(draw(model, guidance=2.5) - draw(plain, guidance=2.5)).max() <= 1
        assert not counters["graph_break"]

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.usefixtures("fresh_compiler")
    def test_with_offloaded_weights(self, tiny_checkpoint: Path) -> None:
        model, plain = load(tiny_checkpoint), load(tiny_checkpoint)
        offload(model._transformer, CPU)
        model._transformer.compile_repeated_blocks(dynamic=True)
        assert abs(draw(model) - draw(plain)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"ZIMAGE_COMPILE": "1", "CXX": "/bin/false"}, "--compile does not work on this machine"),
        ({"ZIMAGE_FLASH_ATTN": "1"}, "--flash-attn needs an NVIDIA GPU"),
        ({"ZIMAGE_LORA": "nowhere.safetensors:0.5"}, "the LoRA nowhere.safetensors cannot be read"),
    ],
)
def test_the_service_ends_with_the_sentence(
    tiny_checkpoint: Path, tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    """Exit status 78, for which a supervisor does not start it again, and the sentence in the last line of its log."""
    told = {
        "ZIMAGE_MODEL_PATH": str(tiny_checkpoint),
        "ZIMAGE_DIFFUSION_PORT": "0",
        "ZIMAGE_DIT_DEVICE": "cpu",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "services.diffusion"],
        env={**os.environ, **told, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == EXIT_UNUSABLE_MODEL
    assert reason in [line for line in done.stderr.splitlines() if "the model cannot be used" in line][-1]
