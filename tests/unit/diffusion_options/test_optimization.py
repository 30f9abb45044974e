"""Offloaded weights, Flash Attention and compiled blocks: the same picture, or one sentence that says what to do."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models import attention_dispatch
from drawing import draw, load, load_pipeline
from fakes import embeddings, parameters
from lora_files import write_original
from torch.nn import functional

from services.diffusion.kernels import FLASH_ATTN, KERNELS
from services.diffusion.loading import limits_of
from services.diffusion.model import ZImageModel
from services.diffusion.optimization import offload, rehearsals, use_kernels
from services.diffusion.option_settings import Attention, OffloadMode
from services.diffusion.settings import DiffusionSettings
from shared.checkpoint import UnusableModel
from shared.device_thread import EXIT_UNUSABLE_MODEL
from shared.errors import InvalidField
from shared.settings import InvalidSettings, Quantization, read_settings
from shared.tensors import quantize

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class TestOffload:
    """On this machine the device that the weights are brought to is the CPU too: all but the copying is real."""

    @pytest.mark.parametrize("mode", list(OffloadMode))
    @pytest.mark.parametrize("guidance", [0.0, 2.5])
    def test_the_picture_is_the_same(self, tiny_checkpoint: Path, guidance: float, mode: OffloadMode) -> None:
        model, plain = load(tiny_checkpoint), load(tiny_checkpoint)
        offload(model.parts.transformer, model.parts.vae, CPU, mode)
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
            use_kernels(transformer, CUDA, FLASH_ATTN, "--flash-attn")

    def test_it_needs_the_package(self, tiny_checkpoint_bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
        monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", False)
        transformer = load_pipeline(tiny_checkpoint_bf16, torch.bfloat16).transformer
        with pytest.raises(
            UnusableModel, match=r"flash-attn 2\.6\.3 or newer: install it with `--no-build-isolation`"
        ) as no:
            use_kernels(transformer, CUDA, FLASH_ATTN, "--flash-attn")
        assert "\n" not in str(no.value)

    def test_diffusers_knows_the_names(self) -> None:
        names = {name for kernels in (*KERNELS.values(), FLASH_ATTN) for name in kernels.names}
        assert {backend.value for backend in attention_dispatch.AttentionBackendName} >= names

    @pytest.mark.usefixtures("restored_backend")
    @pytest.mark.parametrize(("guidance", "negative"), [(0.0, 40), (2.5, 20), (2.5, 40)])
    def test_it_draws_the_same_without_masks(
        self, tiny_checkpoint_bf16: Path, monkeypatch: pytest.MonkeyPatch, guidance: float, negative: int
    ) -> None:
        plain = load(tiny_checkpoint_bf16)
        expected = draw(plain, guidance=guidance, negative_tokens=negative)
        monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", True)
        monkeypatch.setattr(attention_dispatch, "flash_attn_func", flash_attention)
        use_kernels(plain._transformer, CUDA, FLASH_ATTN, "--flash-attn")
        model = ZImageModel(replace(plain.parts, takes_masks=False), plain.footprint)
        picture = draw(model, guidance=guidance, negative_tokens=negative)
        assert abs(picture - expected).max() <= (0 if negative == 20 or not guidance else 8)


@pytest.mark.usefixtures("restored_backend")
class TestTryingOptions:
    """Kernels that are there may still not run; that is found at the start."""

    def break_attention(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def broken(*_: Any, **__: Any) -> Any:
            raise error

        kernels = attention_dispatch._AttentionBackendRegistry._backends
        for name in kernels:
            monkeypatch.setitem(kernels, name, broken)

    def test_kernels_that_do_not_run(
        self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, log_entries: list[Any]
    ) -> None:
        self.break_attention(monkeypatch, RuntimeError("no kernel image is available"))
        with pytest.raises(UnusableModel) as no:
            load(tiny_checkpoint, attention="native")
        told = "--attention native does not work on this machine, the log has the cause: leave it out"
        assert str(no.value) == told
        assert any("no kernel image" in entry.get("cause", "") for entry in log_entries)

    def test_too_little_memory_for_them(self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.break_attention(monkeypatch, torch.OutOfMemoryError("of the device"))
        with pytest.raises(UnusableModel, match=r"too little free memory to try --attention native on 1 pictures of"):
            load(tiny_checkpoint, attention="native")

    def test_without_options_nothing_is_tried(self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.break_attention(monkeypatch, RuntimeError("never called"))
        assert load(tiny_checkpoint)


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
        # the block with and without modulation, for one picture, for several, with guidance, and for several and with
        # guidance where texts need no padding: before the first
        assert compiled == 8
        for case in ({}, {"tokens": 70}, {"height": 128}, {"height": 144, "tokens": 96}):
            assert abs(draw(model, **case) - draw(plain, **case)).max() <= 1
        for case in ({"guidance": 2.5}, {"guidance": 2.5, "negative_tokens": 140}, {"guidance": 2.5, "tokens": 32}):
            assert abs(draw(model, **case) - draw(plain, **case)).max() <= 1
        for guidance, tokens in ((0.0, 32), (0.0, 64), (2.5, 64)):
            model.rehearse(
                parameters(guidance_scale=guidance), tokens=tokens, pictures=2, negative_tokens=64 if guidance else None
            )
        assert counters["stats"]["unique_graphs"] == compiled, "another size must not compile again"
        assert not counters["graph_break"]

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.usefixtures("fresh_compiler")
    def test_with_offloaded_weights(self, tiny_checkpoint: Path) -> None:
        model, plain = load(tiny_checkpoint), load(tiny_checkpoint)
        offload(model.parts.transformer, model.parts.vae, CPU, OffloadMode.GROUP)
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


class TestKernels:
    """Attention kernels that this machine has or lacks."""

    @pytest.mark.usefixtures("restored_backend")
    def test_native_ones_draw_the_same(self, tiny_checkpoint: Path) -> None:
        assert (draw(load(tiny_checkpoint, attention="native")) == draw(load(tiny_checkpoint))).all()

    @pytest.mark.parametrize("kind", [kind for kind, kernels in KERNELS.items() if kernels.capability])
    def test_the_others_need_cuda(self, tiny_checkpoint_bf16: Path, kind: Attention) -> None:
        with pytest.raises(UnusableModel, match=rf"^--attention {kind} needs an NVIDIA GPU, but the DiT runs on 'cpu'"):
            load(tiny_checkpoint_bf16, attention=kind)

    @pytest.mark.parametrize("kind", [Attention.FLASH_3, Attention.SAGE])
    def test_packages_are_named(self, tiny_checkpoint_bf16: Path, kind: Attention) -> None:
        transformer = load_pipeline(tiny_checkpoint_bf16, torch.bfloat16).transformer
        with pytest.raises(UnusableModel, match=r"needs the package .*: (install|build) it") as refused:
            use_kernels(transformer, CUDA, KERNELS[kind], f"--attention {kind}")
        assert "\n" not in str(refused.value)


class TestVae:
    """How the VAE decodes."""

    @pytest.mark.slow
    def test_in_tiles_hardly_anything_changes(self, tiny_checkpoint: Path) -> None:
        whole, tiled = load(tiny_checkpoint), load(tiny_checkpoint, vae_tiling_pixels=0)
        small, large = parameters(), parameters(width=1024, height=640, steps=1)
        for wanted, most in ((small, 0), (large, 24)):
            pictures = [model.start(wanted, embeddings(20), None) for model in (whole, tiled)]
            for model, picture in zip((whole, tiled), pictures, strict=True):
                while not picture.finished:
                    model.step([picture])
            one, other = (
                model.decode([picture])[0].astype(int) for model, picture in zip((whole, tiled), pictures, strict=True)
            )
            assert np.percentile(abs(one - other), 99) <= most
            assert (one == other).all() == (most == 0)

    def test_channels_last_rounds_otherwise(self, tiny_checkpoint: Path) -> None:
        assert abs(draw(load(tiny_checkpoint, vae_channels_last=True)) - draw(load(tiny_checkpoint))).max() <= 1

    def test_several_at_once(self, tiny_checkpoint: Path) -> None:
        model = load(tiny_checkpoint)
        pictures = [model.start(parameters(seed=seed, steps=1), embeddings(20), None) for seed in range(3)]
        for picture in pictures:
            model.step([picture])
        together = model.decode(pictures)
        for picture, pixels in zip(pictures, together, strict=True):
            assert abs(model.decode([picture])[0].astype(int) - pixels.astype(int)).max() <= 1
        assert abs(together[0].astype(int) - together[1].astype(int)).max() > 10


class TestQuantization:
    """Weights in fewer bits."""

    @pytest.mark.parametrize("kind", ["int8", "int8_dynamic", "fp8"])
    def test_the_picture_changes_a_little(self, tiny_checkpoint_bf16: Path, kind: str) -> None:
        pytest.importorskip("torchao", reason="the extra `quantization` is not installed")
        model, plain = load(tiny_checkpoint_bf16, quantization=kind), load(tiny_checkpoint_bf16)
        difference = abs(draw(model) - draw(plain))
        assert 0 < np.percentile(difference, 99) <= 16
        weights = model.parts.transformer.layers[0].feed_forward.w1.weight
        assert type(weights) is not type(plain.parts.transformer.layers[0].feed_forward.w1.weight)
        assert type(model.parts.transformer.t_embedder.mlp[0].weight) is torch.nn.Parameter
        assert type(model.parts.transformer.layers[0].adaLN_modulation[0].weight) is torch.nn.Parameter

    def test_in_products_of_fp8_what_shares_a_forward_has_scales_of_its_own(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torchao = pytest.importorskip("torchao.quantization", reason="the extra `quantization` is not installed")
        used: list[Any] = []
        monkeypatch.setattr("shared.tensors._multiplies_fp8", lambda _: True)
        monkeypatch.setattr(torchao, "quantize_", lambda _, recipe, **__: used.append(recipe))
        quantize(torch.nn.Linear(8, 8), Quantization.FP8_DYNAMIC, CPU, flag="--quantization", wanted=lambda *_: True)
        assert [type(granularity) for granularity in used[0].granularity] == [torchao.PerRow] * 2

    @pytest.mark.parametrize("kind", ["int8", "int8_dynamic", "fp8"])
    def test_loras_are_added_to_them(self, tiny_checkpoint_bf16: Path, tmp_path: Path, kind: str) -> None:
        pytest.importorskip("torchao", reason="the extra `quantization` is not installed")
        write_original(tmp_path, load_pipeline(tiny_checkpoint_bf16, torch.bfloat16).transformer)
        model = load(tiny_checkpoint_bf16, quantization=kind, lora_dir=tmp_path)
        before = draw(model)
        assert abs(draw(model, loras=(("original-0", 1.0),)) - before).max() > 10
        assert (draw(model) == before).all()

    @pytest.mark.parametrize("kind", ["int8", "fp8"])
    def test_it_needs_the_package(self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        monkeypatch.setitem(sys.modules, "torchao", None)
        with pytest.raises(
            UnusableModel, match=rf"^--quantization {kind} needs the package torchao: `ZIMAGE_EXTRAS=quanti"
        ):
            load(tiny_checkpoint, quantization=kind)

    def test_compiled_weights_of_8_bits_crash_on_a_cpu(self, tiny_checkpoint: Path) -> None:
        with pytest.raises(UnusableModel, match=r"^--compile and --quantization int8 cannot be combined on a CPU"):
            load(tiny_checkpoint, quantization="int8", compile=True)

    def test_fp8_arithmetic_needs_a_gpu(self, tiny_checkpoint: Path) -> None:
        with pytest.raises(UnusableModel, match=r"^--quantization fp8_dynamic needs an NVIDIA GPU of compute"):
            load(tiny_checkpoint, quantization="fp8_dynamic")


class TestCacheDit:
    """Blocks that are skipped."""

    def test_the_picture_is_drawn_with_each_count_of_steps(self, tiny_checkpoint_bf16: Path) -> None:
        pytest.importorskip("cache_dit", reason="the extra `cache` is not installed")
        model, plain = load(tiny_checkpoint_bf16, cache_dit=True), load(tiny_checkpoint_bf16)
        for steps in (2, 12, 3):
            pictures = [one.start(parameters(steps=steps), embeddings(20), None) for one in (model, plain)]
            for one, picture in zip((model, plain), pictures, strict=True):
                while not picture.finished:
                    one.step([picture])
            ours, theirs = (one.decode([p])[0].astype(int) for one, p in zip((model, plain), pictures, strict=True))
            assert np.percentile(abs(ours - theirs), 99) <= 40

    def test_guidance_that_ends_early_is_refused(self, tiny_checkpoint_bf16: Path) -> None:
        pytest.importorskip("cache_dit", reason="the extra `cache` is not installed")
        model = load(tiny_checkpoint_bf16, cache_dit=True)
        wanted = parameters(guidance_scale=2.0, cfg_truncation=0.1, steps=9)
        with pytest.raises(InvalidField, match="'cfg_truncation' must be 1 here"):
            model.start(wanted, embeddings(20), embeddings(5))

    def test_forwards_that_cannot_be_compared_are_refused(self, tiny_checkpoint: Path) -> None:
        """Kernels without masks take prompt and negative prompt of unlike length in two forwards a step."""
        begun: list[int] = []
        plain = load(tiny_checkpoint)
        model = ZImageModel(replace(plain.parts, before_picture=begun.append, takes_masks=False), plain.footprint)
        with pytest.raises(InvalidField, match="'guidance_scale' must be 0 for these texts"):
            model.start(parameters(guidance_scale=2.0), embeddings(40), embeddings(5))
        for text in (embeddings(20), embeddings(32)):
            model.start(parameters(guidance_scale=2.0), text, embeddings(5))
        model.start(parameters(), embeddings(40), None)
        assert begun == [4, 4, 4]

    def test_what_is_drawn_at_the_start_can_be_compared(self, tiny_checkpoint: Path) -> None:
        plain = load(tiny_checkpoint)
        parts = replace(plain.parts, before_picture=lambda _: None, takes_masks=False)
        settings = DiffusionSettings(model_path=tiny_checkpoint, cache_dit=True)
        for one in rehearsals(settings, lambda _: 1, takes_masks=False):
            ZImageModel(parts, plain.footprint).rehearse(
                one.parameters, tokens=one.tokens, negative_tokens=one.negative_tokens
            )
        assert one.parameters.guidance_scale > 0

    def test_loras_are_switched(self, tiny_checkpoint_bf16: Path, tmp_path: Path) -> None:
        pytest.importorskip("cache_dit", reason="the extra `cache` is not installed")
        write_original(tmp_path, load_pipeline(tiny_checkpoint_bf16, torch.bfloat16).transformer)
        model = load(tiny_checkpoint_bf16, cache_dit=True, lora_dir=tmp_path)
        before = draw(model)
        assert abs(draw(model, loras=(("original-0", 1.0),)) - before).max() > 10
        assert (draw(model) == before).all()

    def test_it_needs_the_package(self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cache_dit", None)
        with pytest.raises(
            UnusableModel, match=r"^--cache-dit needs the package cache-dit: `ZIMAGE_EXTRAS=cache make install`"
        ):
            load(tiny_checkpoint, cache_dit=True)

    def test_pictures_are_made_one_at_a_time(self, tiny_checkpoint: Path) -> None:
        limits = limits_of(DiffusionSettings(model_path=tiny_checkpoint, dit_device="cpu", cache_dit=True))
        assert (limits.running, limits.batch) == (1, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"flash_attn": True, "attention": "sage"},
        {"compile": True, "lora_dir": "x"},
        {"cache_dit": True, "compile": True},
        {"cache_dit": True, "cpu_offload": True},
        {"quantization": "int8", "cpu_offload": True},
        {"lora_dir": "x", "cpu_offload": True},
    ],
)
def test_options_that_contradict_each_other_are_one_sentence(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in options.items():
        monkeypatch.setenv(f"ZIMAGE_{name.upper()}", str(value))
    with pytest.raises(InvalidSettings, match=r"^--[a-z-]+ and .*--[a-z-]+ .*: leave one (of them )?out$"):
        read_settings(DiffusionSettings)


@pytest.mark.parametrize("text", ["1024", "1024x", "1000x1024", "8x1024", "1024x9000", "a"])
def test_sizes_to_compile_for(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_COMPILE_SIZES", text)
    with pytest.raises(InvalidSettings, match="a size is written like 1024x768"):
        read_settings(DiffusionSettings)
    monkeypatch.setenv("ZIMAGE_COMPILE_SIZES", "512x512,1024x768")
    monkeypatch.setenv("ZIMAGE_COMPILE", "true")
    settings = read_settings(DiffusionSettings)
    sizes = (256, 176), (512, 512), (1024, 768)
    drawn = rehearsals(settings, lambda shape: 1 if shape.pixels > 512 * 512 else 8)
    assert [((one.parameters.width, one.parameters.height), one.pictures, one.negative_tokens) for one in drawn] == [
        (sizes[2], 1, None),
        *((size, count, None) for size in (sizes[1], sizes[0]) for count in (1, 2)),
        (sizes[0], 1, 70),
        (sizes[0], 2, None),
        (sizes[0], 1, 64),
    ]
    assert [one.tokens for one in drawn] == [20] * 6 + [32] * 2
