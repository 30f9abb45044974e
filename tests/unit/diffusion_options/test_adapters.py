"""LoRAs that requests choose: side by side on one DiT, equal to fused ones within rounding, gone without a trace."""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing import draw, load, load_pipeline, named
from fakes import embeddings, parameters
from lora_files import write, write_diffusers, write_kohya, write_original
from safetensors.torch import load_file, save_file

from services.diffusion.model import ZImageModel
from services.diffusion.shapes import Lora, Shape
from shared.checkpoint import UnusableModel
from shared.errors import InvalidField, OutOfMemory, UnknownName
from shared.schemas.diffusion import LoraChoice

FORMATS = {"diffusers": write_diffusers, "kohya": write_kohya, "original": write_original}


def names(loras: tuple[Lora, ...]) -> tuple[tuple[str, float], ...]:
    return tuple((lora.name, scale) for lora, scale in loras)


class TestPictures:
    """What an adapter draws."""

    @pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
    @pytest.mark.parametrize("scale", [1.0, 0.6, -0.5])
    def test_it_equals_the_fused_one_within_rounding(
        self, make: Any, scale: float, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        place = tmp_path / "loras"
        place.mkdir()
        path = make(place, load_pipeline(tiny_checkpoint, torch.float32).transformer)
        fused = draw(load(tiny_checkpoint, lora=[f"{path}:{scale}"]))
        adapted = draw(load(tiny_checkpoint, lora_dir=place), loras=((path.stem, scale),))
        assert abs(adapted - fused).max() <= 1
        assert abs(adapted - draw(load(tiny_checkpoint))).max() > 3

    def test_several_equal_the_fused_ones(self, tiny_checkpoint: Path, folder: Path, model: ZImageModel) -> None:
        ink, oil = folder / "ink.safetensors", folder / "oil.safetensors"
        fused = draw(load(tiny_checkpoint, lora=[f"{ink}:0.8", f"{oil}:-0.3"]))
        assert abs(draw(model, loras=(("ink", 0.8), ("oil", -0.3))) - fused).max() <= 1

    def test_without_one_nothing_is_changed_bit_for_bit(self, tiny_checkpoint: Path, model: ZImageModel) -> None:
        base = draw(load(tiny_checkpoint))
        assert np.array_equal(draw(model), base)
        with_ink = draw(model, loras=(("ink", 1.0),))
        assert not np.array_equal(with_ink, base)
        assert np.array_equal(draw(model), base)
        assert np.array_equal(draw(model, loras=(("ink", 1.0),)), with_ink)

    def test_a_scale_of_zero_leaves_it_out(self, tiny_checkpoint: Path, model: ZImageModel) -> None:
        choices = [LoraChoice(name="ink", scale=0.0), LoraChoice(name="oil", scale=0)]
        loras = model.adapters.choose(choices)
        assert loras == ()
        assert np.array_equal(draw(model, loras=loras), draw(load(tiny_checkpoint)))
        assert model.adapters.loaded == []

    def test_bfloat16(self, tiny_checkpoint_bf16: Path, folder: Path) -> None:
        model, base = load(tiny_checkpoint_bf16, lora_dir=folder), load(tiny_checkpoint_bf16)
        fused = draw(load(tiny_checkpoint_bf16, lora=[str(folder / "ink.safetensors")]))
        adapted = draw(model, loras=(("ink", 1.0),))
        assert np.percentile(abs(adapted - fused), 99) <= 12
        assert np.array_equal(draw(model), draw(base))


class TestKeeping:
    """Which adapters stay on the device."""

    def test_the_last_used_stay(self, tiny_checkpoint: Path, folder: Path) -> None:
        model = load(tiny_checkpoint, lora_dir=folder)
        one = model.adapters.bytes_of([model.adapters.shelf.files["ink"]])
        assert one > 0
        model.adapters._max_bytes = 2 * one
        first = draw(model, loras=(("ink", 1.0),))
        draw(model, loras=(("oil", 1.0),))
        draw(model, loras=(("ink", 0.5),))
        assert model.adapters.loaded == ["oil", "ink"]
        draw(model, loras=(("styles/v1.0 chalk", 1.0),))
        assert model.adapters.loaded == ["ink", "styles/v1.0 chalk"]
        draw(model, loras=(("oil", 1.0),))
        assert np.array_equal(draw(model, loras=(("ink", 1.0),)), first)

    def test_those_in_use_are_not_dropped(self, model: ZImageModel) -> None:
        model.adapters._max_bytes = model.adapters.bytes_of([model.adapters.shelf.files["ink"]])
        ink, oil = named(model, ("ink", 1.0), ("oil", 1.0))
        model.adapters.load([ink])
        model.adapters.load([oil], in_use={ink[0]})
        assert set(model.adapters.loaded) == {"ink", "oil"}
        assert not model.adapters.fit([ink[0], oil[0]])

    def test_what_alone_is_too_much_is_refused(self, model: ZImageModel) -> None:
        model.adapters._max_bytes = model.adapters.bytes_of([model.adapters.shelf.files["ink"]])
        with pytest.raises(InvalidField, match="'loras' takes more than the"):
            model.adapters.choose([LoraChoice(name="ink"), LoraChoice(name="oil")])

    def test_a_file_that_changes_is_read_again(self, model: ZImageModel, folder: Path) -> None:
        before = draw(model, loras=(("ink", 1.0),))
        shutil.copy(folder / "oil.safetensors", folder / "ink.safetensors")
        os.utime(folder / "ink.safetensors", (1, 1))
        after = draw(model, loras=model.adapters.choose([LoraChoice(name="ink")]))
        assert not np.array_equal(after, before)
        assert np.array_equal(after, draw(model, loras=(("oil", 1.0),)))

    def test_a_file_that_goes_away(self, model: ZImageModel, folder: Path) -> None:
        loras = model.adapters.choose([LoraChoice(name="ink")])
        (folder / "ink.safetensors").unlink()
        with pytest.raises(UnknownName):
            model.adapters.choose([LoraChoice(name="ink")])
        with pytest.raises(InvalidField, match="'ink' is no longer there"):
            draw(model, loras=loras)
        draw(model, loras=(("oil", 1.0),))


class TestRoom:
    """What LoRAs leave of a device's memory to pictures."""

    def test_idle_ones_make_room(self, model: ZImageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        draw(model, loras=(("ink", 1.0),))
        one = model.adapters.loaded_bytes
        assert one == model.adapters.bytes_of([model.adapters.shelf.files["ink"]]) > 0
        oiled = Shape(height=64, width=64, text_tokens=32, loras=named(model, ("oil", 1.0)))
        needed = model.footprint.together([oiled]) + one
        monkeypatch.setattr("services.diffusion.model.free_memory", lambda _: needed - one)
        free = model.free_bytes()
        assert free == needed, "what idles could be taken off the device"
        assert model.fits([oiled], free)
        model.make_room([oiled], free + one)
        assert model.adapters.loaded == ["ink"], "there is room for both"
        model.make_room([oiled], free)
        assert model.adapters.loaded == []

    def test_only_idle_ones_are_dropped(self, model: ZImageModel) -> None:
        plain = draw(model)
        picture = model.start(parameters(), embeddings(20), None, named(model, ("ink", 1.0)))
        draw(model, loras=(("oil", 1.0),))
        model.drop_idle_loras()
        assert model.adapters.loaded == ["ink"]
        model.step([picture])
        assert np.array_equal(draw(model), plain)

    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
            (torch.AcceleratorError("device-side assert"), torch.AcceleratorError),
            (RuntimeError("size mismatch"), InvalidField),
        ],
    )
    def test_an_error_of_the_device_is_not_the_files(
        self, model: ZImageModel, monkeypatch: pytest.MonkeyPatch, error: Exception, told: type[Exception]
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        with monkeypatch.context() as broken:
            broken.setattr("services.diffusion.loras.ZImageLoraLoaderMixin.load_lora_into_transformer", fail)
            with pytest.raises(told):
                draw(model, loras=(("ink", 1.0),))
        draw(model, loras=(("ink", 1.0),))


class TestFolder:
    """What the folder offers, and what it does not."""

    def test_names_and_metadata(self, model: ZImageModel, folder: Path) -> None:
        save_file(
            load_file(folder / "ink.safetensors"),
            folder / "told.safetensors",
            metadata={"trigger": "in ink", "long": "x" * 10_000},
        )
        model.adapters.shelf.refresh()
        files = model.adapters.shelf.files
        assert set(files) == {"ink", "oil", "styles/v1.0 chalk", "told"}
        assert files["told"].metadata == {"trigger": "in ink", "long": "x" * 2_000}
        assert files["ink"].rank == 4
        assert files["ink"].bytes == (folder / "ink.safetensors").stat().st_size

    @pytest.mark.parametrize(
        "name", ["nope", "../ink", "ink.safetensors", "/etc/passwd", "styles\\v1.0 chalk", "INK", "styles/../ink", "."]
    )
    def test_names_that_are_not_there(self, model: ZImageModel, name: str) -> None:
        with pytest.raises(UnknownName, match="There is no LoRA"):
            model.adapters.choose([LoraChoice(name=name)])

    def test_names_that_are_not_there_do_not_keep_the_disk_busy(
        self, model: ZImageModel, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shelf, looks, gate = model.adapters.shelf, list[int](), threading.Event()
        look = shelf._look_through

        def slow(where: Path) -> None:
            looks.append(1)
            assert gate.wait(20)
            look(where)

        monkeypatch.setattr(shelf, "_look_through", slow)
        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(model.adapters.choose, [LoraChoice(name=f"no {n}")]) for n in range(8)]
            while not looks:
                time.sleep(0.002)
            time.sleep(0.1)  # for the others to have asked too; fewer of them make no difference
            gate.set()
            assert {type(one.exception(20)) for one in asked} == {UnknownName}
        assert len(looks) <= 3
        monkeypatch.undo()
        shutil.copy(folder / "ink.safetensors", folder / "new.safetensors")
        assert names(model.adapters.choose([LoraChoice(name="new")])) == (("new", 1.0),)

    def test_a_name_given_twice(self, model: ZImageModel) -> None:
        with pytest.raises(InvalidField, match="names a LoRA twice"):
            model.adapters.choose([LoraChoice(name="ink"), LoraChoice(name="ink", scale=0.5)])

    def test_files_that_are_no_whole_safetensors_are_left_out(self, model: ZImageModel, folder: Path) -> None:
        whole = (folder / "ink.safetensors").read_bytes()
        (folder / "cut.safetensors").write_bytes(whole[:-1])
        torch.save({"a": torch.ones(1)}, folder / "pickled.safetensors")
        torch.save({"a": torch.ones(1)}, folder / "pickled.bin")
        model.adapters.shelf.refresh()
        assert set(model.adapters.shelf.files) == {"ink", "oil", "styles/v1.0 chalk"}

    def test_a_file_for_another_model_is_refused_by_its_name(self, model: ZImageModel, folder: Path) -> None:
        write(folder / "foreign.safetensors", {"diffusion_model.nowhere.lora_A.weight": torch.ones(2, 2)})
        loras = model.adapters.choose([LoraChoice(name="foreign")])
        with pytest.raises(InvalidField) as refused:
            draw(model, loras=loras)
        assert str(refused.value).startswith("The LoRA 'foreign' ")
        assert str(folder) not in str(refused.value)
        draw(model, loras=(("ink", 1.0),))

    def test_a_folder_that_is_not_there(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(UnusableModel, match=r"folder of LoRAs .* does not exist"):
            load(tiny_checkpoint, lora_dir=tmp_path / "gone")


class TestDefault:
    """The flags' LoRAs are those of a picture that names none."""

    def test_with_a_folder_they_can_be_replaced(self, tiny_checkpoint: Path, folder: Path) -> None:
        path = folder / "ink.safetensors"
        model = load(tiny_checkpoint, lora_dir=folder, lora=[f"{path}:0.5"])
        choose = model.adapters.choose
        assert names(choose(None)) == (("ink", 0.5),)
        assert choose([]) == ()
        assert names(choose([LoraChoice(name="oil")])) == (("oil", 1.0),)
        fused = draw(load(tiny_checkpoint, lora=[f"{path}:0.5"]))
        assert abs(draw(model, loras=choose(None)) - fused).max() <= 1
        assert np.array_equal(draw(model, loras=choose([])), draw(load(tiny_checkpoint)))

    def test_they_may_lie_elsewhere(self, tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
        elsewhere = tmp_path / "mine.safetensors"
        shutil.move(folder / "ink.safetensors", elsewhere)
        model = load(tiny_checkpoint, lora_dir=folder, lora=[f"{elsewhere}:0.5"])
        assert names(model.adapters.choose(None)) == (("mine", 0.5),)
        assert "mine" in model.adapters.shelf.files

    def test_one_that_is_named_twice_has_both_scales(self, tiny_checkpoint: Path, folder: Path) -> None:
        path = folder / "ink.safetensors"
        model = load(
            tiny_checkpoint, lora_dir=folder, lora=[f"{path}:0.5", f"{folder}/oil.safetensors", f"{path}:0.25"]
        )
        assert names(model.adapters.choose(None)) == (("ink", 0.75), ("oil", 1.0))
        none = load(tiny_checkpoint, lora_dir=folder, lora=[f"{path}:0.5", f"{path}:-0.5"])
        assert none.adapters.choose(None) == ()

    def test_one_that_has_the_name_of_another_ends_the_start(
        self, tiny_checkpoint: Path, folder: Path, tmp_path: Path
    ) -> None:
        elsewhere = tmp_path / "ink.safetensors"
        shutil.copy(folder / "oil.safetensors", elsewhere)
        with pytest.raises(UnusableModel, match="cannot be told from another one of its name"):
            load(tiny_checkpoint, lora_dir=folder, lora=[str(elsewhere)])

    def test_more_than_is_kept_ends_the_start(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        place = tmp_path / "large"
        place.mkdir()
        large = {"a.lora_A.weight": torch.zeros(1, 300_000)}  # its header tells: nothing of it is read
        path = write(place / "large.safetensors", large)
        with pytest.raises(UnusableModel, match="'loras' takes more than the 1048576 bytes"):
            load(tiny_checkpoint, lora_dir=place, lora=[str(path)], lora_max_bytes=1 << 20)

    def test_without_a_folder_they_are_fused(self, tiny_checkpoint: Path, folder: Path) -> None:
        model = load(tiny_checkpoint, lora=[str(folder / "ink.safetensors")])
        assert model.adapters.choose(None) == ()
        with pytest.raises(InvalidField, match="fused into its weights"):
            model.adapters.choose([])
        with pytest.raises(UnknownName, match="started without --lora-dir"):
            model.adapters.choose([LoraChoice(name="ink")])

    def test_one_that_cannot_be_used_ends_the_start(self, tiny_checkpoint: Path, folder: Path) -> None:
        path = write(folder / "foreign.safetensors", {"diffusion_model.nowhere.lora_A.weight": torch.ones(2, 2)})
        with pytest.raises(UnusableModel, match="The LoRA 'foreign' has tensors that are not those of a LoRA"):
            load(tiny_checkpoint, lora_dir=folder, lora=[str(path)])
