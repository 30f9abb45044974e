"""`shared.settings`: where a setting comes from, and what is said of one that cannot be used."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from services.diffusion.settings import DiffusionSettings
from services.encoder.settings import EncoderSettings
from services.gateway.settings import GatewaySettings
from services.rewriter.settings import RewriterSettings
from shared.profiles import flatten, read_profile
from shared.settings import (
    Device,
    Dtype,
    InvalidSettings,
    ServiceSettings,
    key_of,
    read_settings,
    variable_of,
)

KINDS = (GatewaySettings, EncoderSettings, DiffusionSettings)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ZIMAGE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a configuration file and names it in the environment."""

    def write(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setenv("ZIMAGE_CONFIG", str(path))
        return path

    return write


def test_the_defaults_of_the_specification() -> None:
    gateway, encoder, diffusion = (read_settings(kind) for kind in KINDS)
    assert gateway.address == ("127.0.0.1", 7860)
    assert (gateway.width, gateway.height, gateway.steps) == (1024, 1024, 9)
    assert (gateway.guidance_scale, gateway.shift, gateway.hidden_layer) == (0.0, 3.0, -2)
    assert gateway.long_prompt_mode == "interpolate"
    assert not gateway.encoder_only
    assert not gateway.use_api_encoder
    assert encoder.text_encoder_device is diffusion.dit_device is diffusion.vae_device is Device.AUTO
    assert encoder.text_encoder_dtype is diffusion.diffusion_dtype is Dtype.AUTO
    assert encoder.model_path is None


FILE = """
[default]
model_path = "/models/one"
[default.devices]
text_encoder = "cpu"
dit = "cuda"
[default.generation]
width = 512
steps = 4
[default.scheduler]
shift = 2.0
[fast.generation]
steps = 1
"""


def test_the_file_of_the_specification(write: Callable[[str], Path]) -> None:
    write(FILE)
    gateway = read_settings(GatewaySettings)
    assert (gateway.width, gateway.height, gateway.steps, gateway.shift) == (512, 1024, 4, 2.0)
    assert read_settings(EncoderSettings).text_encoder_device is Device.CPU
    assert read_settings(DiffusionSettings).dit_device is Device.CUDA
    assert read_settings(DiffusionSettings).model_path == Path("/models/one")


def test_the_environment_wins_over_the_file(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    write(FILE)
    monkeypatch.setenv("ZIMAGE_WIDTH", "256")
    monkeypatch.setenv("ZIMAGE_TEXT_ENCODER_DEVICE", "auto")
    gateway = read_settings(GatewaySettings)
    assert (gateway.width, gateway.steps) == (256, 4)
    assert read_settings(EncoderSettings).text_encoder_device is Device.AUTO
    assert GatewaySettings(width=128).width == 128


def test_another_profile(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    write(FILE)
    monkeypatch.setenv("ZIMAGE_PROFILE", "fast")
    gateway = read_settings(GatewaySettings)
    assert (gateway.width, gateway.steps) == (1024, 1)


@pytest.mark.parametrize(
    ("text", "profile", "told"),
    [
        (FILE, "slow", r"has no profile 'slow'; it has: default, fast"),
        ("", "default", r"has no profile 'default'; it has: none"),
        ("default = 3", "default", r"has no profile 'default'"),
        ("[default", "default", "is not TOML"),
        ("[default]\nx = \x00", "default", "is not TOML"),
    ],
)
def test_files_that_cannot_be_used(
    write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, text: str, profile: str, told: str
) -> None:
    path = write(text)
    monkeypatch.setenv("ZIMAGE_PROFILE", profile)
    with pytest.raises(InvalidSettings, match=told) as refused:
        read_settings(GatewaySettings)
    assert str(path) in str(refused.value)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_CONFIG", str(tmp_path / "gone.toml"))
    with pytest.raises(InvalidSettings, match=r"gone\.toml cannot be read"):
        read_settings(GatewaySettings)
    (tmp_path / "latin.toml").write_bytes(b"[default]\nhost = '\xe9'\n")
    with pytest.raises(InvalidSettings, match="is not TOML"):
        read_profile(tmp_path / "latin.toml", "default")


@pytest.mark.parametrize(
    ("kind", "name", "value", "told"),
    [
        (GatewaySettings, "ZIMAGE_PORT", "70000", "--port (ZIMAGE_PORT) = '70000'"),
        (GatewaySettings, "ZIMAGE_PORT", "many", "--port (ZIMAGE_PORT) = 'many'"),
        (GatewaySettings, "ZIMAGE_WIDTH", "1000", "ZIMAGE_WIDTH = '1000': must be a multiple of 16"),
        (GatewaySettings, "ZIMAGE_SHIFT", "0", "--shift (ZIMAGE_SHIFT) = '0'"),
        (GatewaySettings, "ZIMAGE_LONG_PROMPT_MODE", "squeeze", "--long-prompt-mode (ZIMAGE_LONG_PROMPT_MODE)"),
        (GatewaySettings, "ZIMAGE_REDIS_URL", "r://[", "--redis-url (ZIMAGE_REDIS_URL) = 'r://['"),
        (GatewaySettings, "ZIMAGE_REDIS_URL", "unix://", "--redis-url (ZIMAGE_REDIS_URL) = 'unix://'"),
        (GatewaySettings, "ZIMAGE_REDIS_URL", "localhost:6379", "--redis-url (ZIMAGE_REDIS_URL) = 'localhost:6379'"),
        (
            GatewaySettings,
            "ZIMAGE_REDIS_URL",
            "redis://host:port",
            "--redis-url (ZIMAGE_REDIS_URL) = 'redis://host:port'",
        ),
        (GatewaySettings, "ZIMAGE_ENCODER_URLS", "ftp://host", "--encoder-urls (ZIMAGE_ENCODER_URLS)"),
        (EncoderSettings, "ZIMAGE_TEXT_ENCODER_DEVICE", "gpu", "--text-encoder-device (ZIMAGE_TEXT_ENCODER_DEVICE)"),
        (DiffusionSettings, "ZIMAGE_DIFFUSION_MAX_WAITING", "0", "ZIMAGE_DIFFUSION_MAX_WAITING = '0'"),
        (DiffusionSettings, "ZIMAGE_LOG_FORMAT", "xml", "ZIMAGE_LOG_FORMAT = 'xml'"),
    ],
)
def test_a_bad_value_is_told_with_its_source(
    monkeypatch: pytest.MonkeyPatch, kind: type[ServiceSettings], name: str, value: str, told: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSettings) as refused:
        read_settings(kind)
    assert str(refused.value).startswith(told)
    assert "\n" not in str(refused.value)


def test_a_bad_value_of_the_file_is_told_with_its_key(write: Callable[[str], Path]) -> None:
    path = write("[default.generation]\nsteps = 101\n")
    with pytest.raises(InvalidSettings) as refused:
        read_settings(GatewaySettings)
    assert str(refused.value).startswith(f"generation.steps in [default] of {path} = 101")


def test_a_rule_about_two_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_USE_API_ENCODER", "true")
    with pytest.raises(InvalidSettings, match="--use-api-encoder needs the URL of a backend"):
        read_settings(GatewaySettings)
    monkeypatch.setenv("ZIMAGE_API_URL", "http://mac:8080")
    assert str(read_settings(GatewaySettings).api_url) == "http://mac:8080/"


def test_a_secret_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_API_KEY", "very-secret")
    settings = read_settings(GatewaySettings)
    assert "very-secret" not in repr(settings)
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "very-secret"


@pytest.mark.parametrize("name", ["ZIMAGE_API_KEY", "ZIMAGE_REWRITER_API_KEY"])
def test_a_key_can_stand_in_a_header(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, " sk-1234\n")
    settings = read_settings(RewriterSettings)
    key = settings.api_key or settings.rewriter_api_key
    assert key is not None
    assert key.get_secret_value() == "sk-1234"
    monkeypatch.setenv(name, "  ")
    assert read_settings(RewriterSettings) == RewriterSettings(api_key=None, rewriter_api_key=None)
    for bad in ("two words", "line\nbreak", "schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel", "k" * 8193):
        monkeypatch.setenv(name, bad)
        with pytest.raises(InvalidSettings, match=rf"^{name} = \(hidden\): a key must be") as refused:
            read_settings(RewriterSettings)
        assert bad not in str(refused.value)


def test_the_password_of_a_url_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_ENCODER_URLS", "http://a,ftp://user:secret@host")
    with pytest.raises(InvalidSettings, match=r"ftp://user:\*\*\*@host") as refused:
        read_settings(GatewaySettings)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_described_and_has_a_place_of_its_own(kind: type[ServiceSettings]) -> None:
    keys = [key_of(field) for field in kind.model_fields.values() if key_of(field)]
    assert len(keys) == len(set(keys))
    for name, field in kind.model_fields.items():
        assert field.description, name
        assert variable_of(name) == f"ZIMAGE_{name.upper()}"


def test_services_that_share_a_setting_agree_on_it() -> None:
    fields = [(name, key_of(field), field.default) for kind in KINDS for name, field in kind.model_fields.items()]
    by_name = {name: (key, default) for name, key, default in fields}
    for name, key, default in fields:
        assert (key, default) == by_name[name], name


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_settings(GatewaySettings).width = 64  # type: ignore[misc]


def test_flatten() -> None:
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": [3]}}, "f": {}}) == {"a": 1, "b.c": 2, "b.d.e": [3]}


def test_an_empty_variable_is_none(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    write('[default]\nmodel_path = "/models/a"\n[default.diffusion]\nport = 70000')
    for name in ("ZIMAGE_MODEL_PATH", "ZIMAGE_VL_MODEL_PATH", "ZIMAGE_PORT", "ZIMAGE_DIFFUSION_PORT"):
        monkeypatch.setenv(name, "")
    gateway, encoder = read_settings(GatewaySettings), read_settings(EncoderSettings)
    assert (gateway.port, gateway.vl_model_path, encoder.model_path) == (7860, None, Path("/models/a"))
    with pytest.raises(InvalidSettings, match=r"diffusion\.port in \[default\]"):
        read_settings(DiffusionSettings)
