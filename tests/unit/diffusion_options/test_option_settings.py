"""The options of the DiT by flag, by variable and by file."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer
from typer.testing import CliRunner

from services.diffusion.lora_settings import LoraFile
from services.diffusion.settings import DiffusionSettings
from shared.settings import InvalidSettings, read_settings
from zimage.flags import check_configuration, set_environment, with_flags


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ZIMAGE_")}
    with mock.patch.dict(os.environ, kept, clear=True):
        yield


def by_flags(*flags: str) -> DiffusionSettings:
    """The settings after `zimage serve` with these flags."""
    app = typer.Typer()

    @app.command()
    @with_flags
    def serve(**given: Any) -> None:
        set_environment(given)

    result = CliRunner().invoke(app, flags, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return read_settings(DiffusionSettings)


def by_file(folder: Path, toml: str) -> DiffusionSettings:
    path = folder / "config.toml"
    path.write_text(toml)
    os.environ["ZIMAGE_CONFIG"] = str(path)
    settings = check_configuration(["diffusion"])["diffusion"]
    assert isinstance(settings, DiffusionSettings)
    return settings


def test_by_default_all_is_off() -> None:
    settings = by_flags()
    assert "ZIMAGE_LORA" not in os.environ, "a flag that is not given must not hide the file's LoRAs"
    assert settings.loras == ()
    assert (settings.cpu_offload, settings.flash_attn, settings.compile) == (False, False, False)


def test_each_flag_switches_its_option_on() -> None:
    settings = by_flags("--cpu-offload", "--flash-attn", "--compile")
    assert (settings.cpu_offload, settings.flash_attn, settings.compile) == (True, True, True)


def test_the_file_switches_options_on(tmp_path: Path) -> None:
    settings = by_file(tmp_path, "[default.optimization]\nflash_attn = true\ncompile = true\ncpu_offload = true\n")
    assert (settings.cpu_offload, settings.flash_attn, settings.compile) == (True, True, True)


def test_the_flag_is_repeatable_and_keeps_order() -> None:
    settings = by_flags("--lora", "style.safetensors:0.8", "--lora", "a, b.safetensors:-0.5", "--lora", "c.safetensors")
    assert settings.loras == (
        LoraFile(Path("style.safetensors"), 0.8),
        LoraFile(Path("a, b.safetensors"), -0.5),
        LoraFile(Path("c.safetensors"), 1.0),
    )


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0", "a.safetensors", 0.0),
        ("a.safetensors:-10", "a.safetensors", -10.0),
        ("a.safetensors:1e-1", "a.safetensors", 0.1),
        ("a:b.safetensors", "a:b.safetensors", 1.0),
        ("a:b.safetensors:2", "a:b.safetensors", 2.0),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:0.5", r"C:\loras\a.safetensors", 0.5),
    ],
)
def test_path_and_scale(text: str, path: str, scale: float) -> None:
    os.environ["ZIMAGE_LORA"] = text
    assert read_settings(DiffusionSettings).loras == (LoraFile(Path(path), scale),)


def test_the_variable_takes_several_between_commas() -> None:
    os.environ["ZIMAGE_LORA"] = "a.safetensors:0.5, b.safetensors"
    assert read_settings(DiffusionSettings).loras == (
        LoraFile(Path("a.safetensors"), 0.5),
        LoraFile(Path("b.safetensors"), 1.0),
    )


SPECIFIED = '[default.lora]\npaths = ["/l/one.safetensors", "/l/two.safetensors"]\nscales = [0.8, 0.5]\n'


def test_the_file_as_the_specification_has_it(tmp_path: Path) -> None:
    assert by_file(tmp_path, SPECIFIED).loras == (
        LoraFile(Path("/l/one.safetensors"), 0.8),
        LoraFile(Path("/l/two.safetensors"), 0.5),
    )


def test_scales_of_the_file_default_to_one(tmp_path: Path) -> None:
    loras = by_file(tmp_path, '[default.lora]\npaths = ["a.safetensors", "b.safetensors"]\n').loras
    assert [lora.scale for lora in loras] == [1.0, 1.0]


def test_the_variable_wins_over_the_file(tmp_path: Path) -> None:
    os.environ["ZIMAGE_LORA"] = "mine.safetensors"
    assert by_file(tmp_path, SPECIFIED).loras == (LoraFile(Path("mine.safetensors")),)


def test_an_empty_variable_is_as_none(tmp_path: Path) -> None:
    os.environ["ZIMAGE_LORA"] = ""  # as compose files set one that their user left out
    assert len(by_file(tmp_path, SPECIFIED).loras) == 2


def test_the_files_keys_have_variables_of_their_own(tmp_path: Path) -> None:
    os.environ["ZIMAGE_LORA_SCALES"] = "1,2"
    assert [lora.scale for lora in by_file(tmp_path, SPECIFIED).loras] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "a.safetensors:11",
            "--lora (ZIMAGE_LORA) = 'a.safetensors:11': its scale must be a number between -10 and 10",
        ),
        ("a:nan", "its scale must be a number between"),
        ("a:1e400", "its scale must be a number between"),
        ("a.safetensors:much", "its scale must be a number between"),
        ("a.safetensors:", "its scale must be a number between"),
        (":0.5", "a LoRA is given as path or path:scale"),
        (",", "a LoRA is given as path or path:scale"),
        ("[1]", "= 1: Input should be a valid string"),
        ('["a"', "neither a JSON list nor"),
    ],
)
def test_an_unusable_flag_is_one_sentence(text: str, sentence: str) -> None:
    os.environ["ZIMAGE_LORA"] = text
    with pytest.raises(InvalidSettings) as refusal:
        read_settings(DiffusionSettings)
    assert sentence in str(refusal.value)
    assert str(refusal.value).startswith("--lora (ZIMAGE_LORA) = ")


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        (
            'paths = ["a", "b"]\nscales = [1]',
            "lora.scales must have one number for each entry of lora.paths: there are 2",
        ),
        ("scales = [1.0]", "there are 0 paths and 1 scales"),
        ('paths = ["a"]\nscales = [10.5]', "lora.scales in [default] of"),
        ('paths = ["a"]\nscales = [nan]', "= nan: Input should be"),
        ('paths = ["a"]\nscales = ["much"]', "= 'much': Input should be a valid number"),
        ("paths = [1]", "lora.paths in [default] of"),
        ("paths = 1", "= 1: Input should be a valid tuple"),
        ('path = ["a"]', "there is no such setting"),
    ],
)
def test_an_unusable_file_is_one_sentence(tmp_path: Path, toml: str, sentence: str) -> None:
    with pytest.raises(InvalidSettings) as refusal:
        by_file(tmp_path, f"[default.lora]\n{toml}\n")
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)
