"""`zimage`: what its flags tell the services, and what it says of a host that it cannot listen on."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.diffusion.settings import DiffusionSettings
from services.encoder.settings import EncoderSettings
from shared.settings import BUNDLED_MODEL, read_settings
from zimage.cli import app
from zimage.plan import CannotStart, listen


@pytest.fixture(autouse=True)
def environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command writes into the environment is gone after the test."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("ZIMAGE_")}
    monkeypatch.setattr(os, "environ", others)


def test_the_command_line_says_no_to_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_COMPILE", "true")
    monkeypatch.setenv("ZIMAGE_DEBUG", "true")
    monkeypatch.setattr("zimage.doctor.report.examine_machine", lambda **_: True)
    result = CliRunner().invoke(app, ["doctor", "--no-compile"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    settings = read_settings(DiffusionSettings)
    assert not settings.compile
    assert settings.debug


def test_a_node_reads_the_file_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: started.append(command))
    file = tmp_path / "config.toml"
    file.write_text(f"[mac]\nmodel_path = {str(BUNDLED_MODEL)!r}\nencoder.port = 7999\n", encoding="utf-8")
    flags = ["node", "encoder", "--config", str(file), "--profile", "mac"]
    result = CliRunner().invoke(app, flags, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert started[0][1:] == ["-m", "services.encoder"]
    assert read_settings(EncoderSettings).address == ("127.0.0.1", 7999)


def test_the_table_of_settings_shows_no_password() -> None:
    variables = {"ZIMAGE_REDIS_URL": "redis://:topsecret@host", "ZIMAGE_API_KEY": "alsosecret"}
    result = CliRunner().invoke(app, ["config"], env=variables, catch_exceptions=False)
    assert "redis://:***@host" in result.output
    assert "secret" not in result.output


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("nosuch.invalid", "choose another with --host"),
        ("192.0.2.1", "Cannot assign requested address; choose another with --host"),
    ],
)
def test_a_host_that_is_not_of_this_machine(host: str, told: str) -> None:
    with pytest.raises(CannotStart, match=f"cannot listen on {host} port 0: .*{told}$"):
        listen(host, 0)


def test_a_port_that_is_taken() -> None:
    taken = listen("127.0.0.1", 0)
    with taken.socket, pytest.raises(CannotStart, match=r"choose another with --port$"):
        listen("127.0.0.1", taken.socket.getsockname()[1])
