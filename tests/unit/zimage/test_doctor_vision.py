"""The doctor's look at the vision-language model."""

import json
import shutil
from pathlib import Path

import pytest
from doctor_rows import configured, named

from shared import tensors
from zimage.doctor import vision
from zimage.doctor.row import Row, State

pytestmark = pytest.mark.usefixtures("settings")


@pytest.fixture
def folder(tiny_vision_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_vision_checkpoint, tmp_path / "vl"))


def rows(settings: pytest.MonkeyPatch, model: Path, folder: Path | None, **others: str) -> list[Row]:
    settings.setenv("ZIMAGE_MODEL_PATH", str(model))
    if folder is not None:
        settings.setenv("ZIMAGE_VL_MODEL_PATH", str(folder))
    for name, value in others.items():
        settings.setenv(f"ZIMAGE_{name.upper()}", value)
    return list(vision.vision_rows(configured(), tensors))


def test_a_whole_model(tiny_checkpoint: Path, folder: Path, settings: pytest.MonkeyPatch) -> None:
    found = rows(settings, tiny_checkpoint, folder)
    assert [row.what for row in found] == ["vision model", "vision processor", "vision weights on cpu"]
    assert {row.state for row in found} == {State.OK}
    assert "while a picture is read" in found[-1].detail
    assert "all the time" in rows(settings, tiny_checkpoint, folder, vl_auto_unload="false")[-1].detail


def test_none_is_needed(tiny_checkpoint: Path, settings: pytest.MonkeyPatch) -> None:
    (row,) = rows(settings, tiny_checkpoint, None)
    assert (row.state, "--vl-model-path" in row.todo) == (State.NOTE, True)
    (row,) = rows(settings, tiny_checkpoint, None, vl_urls="http://127.0.0.1:7")
    assert (row.state, "127.0.0.1:7" in row.detail) == (State.NOTE, True)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.safetensors", "vision model"),
        ("config.json", "vision processor"),
        ("preprocessor_config.json", "vision processor"),
        ("tokenizer.json", "vision processor"),
    ],
)
def test_a_file_is_broken(
    tiny_checkpoint: Path, folder: Path, settings: pytest.MonkeyPatch, name: str, what: str
) -> None:
    (folder / name).write_bytes(b"{")
    found = rows(settings, tiny_checkpoint, folder)
    assert [row.state for row in found] == [State.OK] * (len(found) - 1) + [State.MISSING]
    assert (found[-1].what, "--vl-model-path" in found[-1].todo) == (what, True)


def test_another_width_than_the_text_encoder_s(
    tiny_checkpoint: Path, folder: Path, settings: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    path = model / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 96}))
    (told,) = [row for row in rows(settings, model, folder) if row.state is State.MISSING]
    assert "64 numbers, those of the text encoder 96" in told.detail


@pytest.mark.parametrize(("unloads", "state"), [("true", State.NOTE), ("false", State.MISSING)])
def test_too_little_memory(
    tiny_checkpoint: Path, folder: Path, settings: pytest.MonkeyPatch, unloads: str, state: State
) -> None:
    settings.setattr(tensors, "free_memory", lambda _: 1000)
    found = rows(settings, tiny_checkpoint, folder, vl_auto_unload=unloads)
    assert named(found, "vision weights on cpu").state is state
