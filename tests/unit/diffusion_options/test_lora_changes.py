"""LoRA files that are replaced while the server runs: pictures in the making keep theirs, new ones get the new file."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import draw, load, named
from fakes import embeddings, parameters

from services.diffusion.denoising import Denoising
from services.diffusion.model import ZImageModel
from services.diffusion.shapes import Lora
from shared.errors import InvalidField
from shared.schemas.diffusion import LoraChoice

INK, OIL = (("ink", 1.0),), (("oil", 1.0),)


def write_over(folder: Path) -> None:
    """Writes the other LoRA over ink's file, as `cp` does."""
    shutil.copyfile(folder / "oil.safetensors", folder / "ink.safetensors")
    os.utime(folder / "ink.safetensors", (1, 1))


def chosen(model: ZImageModel) -> tuple[Lora, ...]:
    return model.adapters.choose([LoraChoice(name="ink")])


def begun(model: ZImageModel, loras: tuple[Lora, ...]) -> Denoising:
    picture = model.start(parameters(steps=3), embeddings(20), None, loras)
    model.step([picture])
    return picture


def finished(model: ZImageModel, picture: Denoising) -> Any:
    while not picture.finished:
        model.step([picture])
    return model.decode([picture])[0].astype(int)


class TestWeights:
    """Which weights a picture has."""

    def test_those_on_the_device_are_not_the_file(self, tiny_checkpoint: Path, folder: Path, plain: Path) -> None:
        model = load(tiny_checkpoint, lora_dir=folder)
        loras = named(model, ("plain", 1.0))
        before, whole = draw(model, loras=loras), plain.read_bytes()
        for written in (whole[:-4096] + bytes(4096), b""):
            plain.write_bytes(written)
            assert np.array_equal(draw(model, loras=loras), before)

    def test_old_and_new_are_side_by_side(self, model: ZImageModel, folder: Path) -> None:
        inked, oiled = (finished(model, begun(model, named(model, *which))) for which in (INK, OIL))
        old = begun(model, chosen(model))
        write_over(folder)
        new = begun(model, chosen(model))
        assert model.adapters.loaded == ["oil", "ink", "ink"]
        assert old.shape != new.shape
        assert np.array_equal(finished(model, old), inked)
        assert np.array_equal(finished(model, new), oiled)

    def test_one_that_waits_gets_what_is_there_when_it_is_begun(self, model: ZImageModel, folder: Path) -> None:
        waiting = chosen(model)
        write_over(folder)
        picture = begun(model, waiting)
        assert picture.loras == chosen(model) != waiting
        assert np.array_equal(finished(model, picture), finished(model, begun(model, named(model, *OIL))))
        assert model.adapters.loaded == ["ink", "oil"]


class TestKeeping:
    """What stays on the device."""

    def test_the_old_one_goes_when_no_picture_has_it(self, model: ZImageModel, folder: Path) -> None:
        old = begun(model, chosen(model))
        write_over(folder)
        draw(model, loras=chosen(model))
        draw(model, loras=OIL)
        assert model.adapters.loaded == ["ink", "ink", "oil"]
        del old
        draw(model, loras=OIL)
        assert model.adapters.loaded == ["ink", "oil"]

    def test_both_count(self, model: ZImageModel, folder: Path) -> None:
        model.adapters._max_bytes = model.adapters.bytes_of([named(model, *INK)[0][0]])
        old = begun(model, chosen(model))
        write_over(folder)
        new = replace(old.shape, loras=chosen(model))
        assert model.fits([old.shape, old.shape], None)
        assert model.fits([new, new], None)
        assert not model.fits([old.shape, new], None)

    def test_one_that_is_gone_stays_for_those_who_chose_it(self, model: ZImageModel, folder: Path) -> None:
        before, ink = draw(model, loras=INK), named(model, *INK)
        (folder / "ink.safetensors").unlink()
        model.adapters.shelf.refresh()
        draw(model, loras=OIL)
        assert np.array_equal(draw(model, loras=ink), before)
        model.drop_idle_loras()
        with pytest.raises(InvalidField, match="'ink' is no longer there"):
            draw(model, loras=ink)


class TestDefault:
    """Files of the flags, which change like others."""

    def test_it_follows_its_file(self, tiny_checkpoint: Path, folder: Path) -> None:
        model = load(tiny_checkpoint, lora_dir=folder, lora=[str(folder / "ink.safetensors")])
        before = draw(model, loras=model.adapters.choose(None))
        write_over(folder)
        after = draw(model, loras=model.adapters.choose(None))
        assert not np.array_equal(after, before)
        assert np.array_equal(after, draw(model, loras=OIL))

    def test_it_stays_while_its_file_is_written(self, tiny_checkpoint: Path, folder: Path) -> None:
        path = folder / "ink.safetensors"
        model = load(tiny_checkpoint, lora_dir=folder, lora=[str(path)])
        before = draw(model, loras=model.adapters.choose(None))
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert np.array_equal(draw(model, loras=model.adapters.choose(None)), before)
        assert model.adapters.shelf.default == {"ink": 1.0}

    @pytest.fixture
    def mine(self, folder: Path, tmp_path: Path) -> Path:
        """A LoRA that does not lie in the folder."""
        return (folder / "ink.safetensors").rename(tmp_path / "mine.safetensors")

    def test_a_file_that_comes_later_does_not_take_its_name(
        self, tiny_checkpoint: Path, folder: Path, mine: Path, log_entries: list[dict[str, object]]
    ) -> None:
        model = load(tiny_checkpoint, lora_dir=folder, lora=[str(mine)])
        late = shutil.copy(folder / "oil.safetensors", folder / "mine.safetensors")
        for _ in range(3):
            model.adapters.shelf.refresh()
        assert model.adapters.shelf.files["mine"].path == mine
        assert model.adapters.choose(None) == model.adapters.choose([LoraChoice(name="mine")])
        warned = [entry for entry in log_entries if entry["log_level"] == "warning" and "path" in entry]
        assert [(entry["path"], entry["kept"]) for entry in warned] == [(str(late), str(mine))]

    def test_a_link_that_comes_later_does_not_take_it_away(
        self, tiny_checkpoint: Path, folder: Path, mine: Path
    ) -> None:
        model = load(tiny_checkpoint, lora_dir=folder, lora=[str(mine)])
        (folder / "linked.safetensors").symlink_to(mine)
        model.adapters.shelf.refresh()
        assert {"mine", "linked"} <= set(model.adapters.shelf.files)
