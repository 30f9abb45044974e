"""The benchmark for a CUDA device, played with a tiny model on the CPU: real pipeline, real engine, real options."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch

from benchmarks import gpu
from benchmarks.gpu_models import PUBLISHED, TINY, make_models, numbers_of, step_operations
from benchmarks.gpu_options import OPTIONS, Option, built
from benchmarks.gpu_report import BASELINE
from services.diffusion.kernels import KERNELS
from shared.settings import Quantization
from zimage.architecture import make_text_encoder, make_transformer, make_vae

CPU = torch.device("cpu")
EAGER = [option.name for option in OPTIONS if not option.settings.get("compile")]


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log stays that of the tests."""
    monkeypatch.setattr(gpu, "configure_logs", lambda _: None)


def play(output: Path, *flags: str) -> dict[str, Any]:
    """What the benchmark finds."""
    gpu.main(["--tiny", "--device", "cpu", "--output", str(output), *flags])
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # of torchao and cache-dit, where they are installed
def test_each_option_is_measured_or_told_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = [flag for name in EAGER for flag in ("--only", name)]
    found = play(tmp_path / "out" / "gpu.json", "--most", "2", *only)
    rows = {(row["option"], row["side"], row["batch"]): row for row in found["rows"]}
    cells = [(side, batch) for batch in (1, 2) for side in TINY.sides]
    assert {(BASELINE, *cell) for cell in cells} | {("engine", *cell) for cell in cells} <= set(rows)
    for name in EAGER:
        assert (name in found["left_out"]) != any(row["option"] == name for row in found["rows"]), name
    for row in found["rows"]:
        assert row["seconds_a_picture"] > 0
        assert row["share_of_peak"] > 0
    for side in TINY.sides:
        assert rows["engine", side, 1]["mean_levels"] == rows[BASELINE, side, 1]["mean_levels"] == 0
        assert rows["engine", side, 2]["most_levels"] <= 16
        assert rows["a LoRA of rank 16", side, 1]["mean_levels"] > 1
    assert "needs an NVIDIA GPU" in found["left_out"]["cudnn"]
    assert [(one["option"], one["tokens"]) for one in found["encodings"]][:2] == [("as it is", 512), ("as it is", 32)]
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert table in capsys.readouterr().out
    for row in found["rows"]:
        assert f"| {row['option']} | {row['side']}x{row['side']} | {row['batch']} |" in table
    for what, why in found["left_out"].items():
        assert f"- {what}: {why}" in table


def test_without_time_nothing_is_measured_but_all_is_told(tmp_path: Path) -> None:
    found = play(tmp_path / "gpu.json", "--budget", "0")
    assert found["rows"] == []
    assert set(found["left_out"].values()) == {gpu.NO_TIME}
    assert {option.name for option in OPTIONS} <= set(found["left_out"])


@pytest.mark.slow
def test_what_fails_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a kernel's own text\nand more of it")

    monkeypatch.setattr(gpu, "built", broken)
    found = play(tmp_path / "gpu.json", "--most", "1", "--only", "engine", "--only", "native")
    assert {found["left_out"][name] for name in ("engine", "native")} == {"a kernel's own text"}
    assert {row["option"] for row in found["rows"]} == {BASELINE}


def test_an_option_leaves_the_next_one_its_attention() -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    models = make_models(TINY, CPU)
    with attention_dispatch.attention_backend("_native_math"):
        with built(models, Option(name="native", settings={"attention": "native"}), 64):
            assert registry.get_active_backend()[0] == "native"
        assert registry.get_active_backend()[0] == "_native_math"


def test_every_option_of_the_service_is_among_those_measured() -> None:
    told = [option.settings for option in OPTIONS]
    assert {settings.get("attention") for settings in told} >= {kind.value for kind in KERNELS}
    assert {settings.get("quantization") for settings in told} >= {kind.value for kind in Quantization} - {"none"}
    for switch in ("compile", "cache_dit", "cpu_offload", "vae_channels_last", "vae_tiling_pixels"):
        assert any(switch in settings for settings in told)
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)


def test_the_published_size() -> None:
    shape = PUBLISHED.shape
    with torch.device("meta"):
        transformer, vae = make_transformer(shape), make_vae(shape)
        encoder = make_text_encoder(shape, PUBLISHED.vocabulary).model
    assert numbers_of(transformer) == pytest.approx(6.15e9, rel=0.01)
    assert numbers_of(vae) == pytest.approx(83.8e6, rel=0.01)
    assert numbers_of(encoder) == pytest.approx(4.02e9, rel=0.01)
    assert transformer.config.dim == 3840
    one, two = (step_operations(transformer, tokens) for tokens in (1056, 4128))
    assert 4 < two / one < 5, "attention grows faster than the picture"
    assert two == pytest.approx(5.9e13, rel=0.05)


def test_parts_are_made_where_they_are_used() -> None:
    models = make_models(TINY, CPU)
    parts = (models.transformer, models.vae, models.encoder)
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for part in parts for weight in part.parameters())
    assert torch.get_default_dtype() == torch.float32
