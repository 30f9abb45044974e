"""The doctor's look at the model directory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from doctor_rows import configured, named

from services.diffusion.settings import DiffusionSettings
from services.encoder.settings import EncoderSettings
from shared import tensors
from zimage.doctor import model
from zimage.doctor.row import Row, State

pytestmark = pytest.mark.usefixtures("settings")


class TestModel:
    def rows(self, path: Path, settings: pytest.MonkeyPatch, **others: str) -> list[Row]:
        settings.setenv("ZIMAGE_MODEL_PATH", str(path))
        devices = dict.fromkeys(("text_encoder_device", "dit_device", "vae_device"), "cpu")
        for name, value in {**devices, **others}.items():
            settings.setenv(f"ZIMAGE_{name.upper()}", value)
        return model.model_rows(configured(), tensors)

    def test_without_a_path_the_bundled_model_is_used(
        self, tiny_checkpoint: Path, settings: pytest.MonkeyPatch
    ) -> None:
        settings.setattr("shared.settings.BUNDLED_MODEL", tiny_checkpoint)
        row, *_ = model.model_rows(configured(), tensors)
        assert row.state is State.OK
        assert "bundled demo model" in row.detail

    def test_only_parts_that_run_here_are_looked_at(self, tiny_checkpoint: Path, settings: pytest.MonkeyPatch) -> None:
        rows = self.rows(tiny_checkpoint, settings, encoder_only="true")
        assert [row.what for row in rows] == ["model", "model text_encoder", "weights on cpu"]
        rows = self.rows(tiny_checkpoint, settings, use_api_encoder="true", api_url="http://127.0.0.1:1")
        assert [row.state for row in rows] == [State.NOTE]

    def test_a_rewriter_with_weights_of_its_own(self, tiny_checkpoint: Path, settings: pytest.MonkeyPatch) -> None:
        shared = named(self.rows(tiny_checkpoint, settings, encoder_only="true"), "weights on cpu")
        own = {"encoder_only": "true", "rewriter_backend": "local", "rewriter_device": "cpu"}
        rows = self.rows(tiny_checkpoint, settings, **own)
        assert named(rows, "model text_encoder for the rewriter").state is State.OK
        assert named(rows, "weights on cpu").detail != shared.detail, "they are in memory twice"

    @pytest.mark.parametrize("part", [*EncoderSettings.parts, *DiffusionSettings.parts])
    def test_a_part_is_missing(
        self, tiny_checkpoint: Path, settings: pytest.MonkeyPatch, tmp_path: Path, part: str
    ) -> None:
        copy = copied(tiny_checkpoint, tmp_path)
        shutil.rmtree(copy / part)
        (row,) = self.rows(copy, settings)
        assert row.state is State.MISSING
        assert f"'{part}' is missing" in row.detail

    def test_no_torch(self, tiny_checkpoint: Path, settings: pytest.MonkeyPatch) -> None:
        settings.setenv("ZIMAGE_MODEL_PATH", str(tiny_checkpoint))
        assert all(row.state is State.OK for row in model.model_rows(configured(), None))

    def test_a_shard_is_missing(self, tiny_checkpoint: Path, settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
        copy = copied(tiny_checkpoint, tmp_path)
        index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "two.safetensors"}}
        (copy / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        row = named(self.rows(copy, settings), "model vae")
        assert row.state is State.MISSING
        assert "two.safetensors is missing" in row.detail

    def test_a_broken_index(self, tiny_checkpoint: Path, settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
        copy = copied(tiny_checkpoint, tmp_path)
        (copy / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": []}')
        assert named(self.rows(copy, settings), "model vae").state is State.MISSING

    def test_a_truncated_file(self, tiny_checkpoint: Path, settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
        copy = copied(tiny_checkpoint, tmp_path)
        weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
        data = weights.read_bytes()
        weights.unlink()
        weights.write_bytes(data[:-1])
        row = named(self.rows(copy, settings), "model transformer")
        assert row.state is State.MISSING
        assert "truncated" in row.detail

    def test_a_device_that_is_not_here(self, tiny_checkpoint: Path, settings: pytest.MonkeyPatch) -> None:
        absent = "mps" if torch.cuda.is_available() else "cuda"
        row = named(self.rows(tiny_checkpoint, settings, vae_device=absent), "device of vae")
        assert row.state is State.MISSING

    @pytest.mark.parametrize(
        ("share", "state"), [(0.5, State.MISSING), (1.1, State.NOTE), (2.0, State.OK), (None, State.NOTE)]
    )
    def test_memory(
        self,
        tiny_checkpoint: Path,
        settings: pytest.MonkeyPatch,
        monkeypatch: pytest.MonkeyPatch,
        share: float | None,
        state: State,
    ) -> None:
        weights = sum(path.stat().st_size for path in tiny_checkpoint.rglob("*.safetensors"))
        monkeypatch.setattr(tensors, "free_memory", lambda _: None if share is None else int(share * weights))
        rows = self.rows(tiny_checkpoint, settings)
        assert named(rows, "weights on cpu").state is state

    def test_the_dtype_counts(self, tiny_checkpoint: Path, settings: pytest.MonkeyPatch) -> None:
        whole = named(self.rows(tiny_checkpoint, settings), "weights on cpu").detail
        settings.setenv("ZIMAGE_TEXT_ENCODER_DTYPE", "bfloat16")
        half = named(self.rows(tiny_checkpoint, settings, diffusion_dtype="bfloat16"), "weights on cpu").detail
        assert whole.startswith("3.8 MB")
        assert half.startswith("1.9 MB")

    def test_flash_attention_takes_no_float32(self, tiny_checkpoint: Path, settings: pytest.MonkeyPatch) -> None:
        rows = self.rows(tiny_checkpoint, settings, flash_attn="true")
        assert named(rows, "attention flash").state is State.MISSING

    def test_loras(self, settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert model.lora_rows(configured()) == []
        (tmp_path / "a.safetensors").write_bytes(b"\x80pickle")
        settings.setenv("ZIMAGE_LORA", json.dumps([f"{tmp_path}/a.safetensors:0.5", f"{tmp_path}/b.safetensors"]))
        assert [row.state for row in model.lora_rows(configured())] == [State.MISSING, State.MISSING]


def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy whose files are links to the same bytes: replace a file, don't write into it."""
    copy = tmp_path / "model"
    for path in folder.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(path)
    return copy
