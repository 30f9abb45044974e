"""The doctor's look at GPUs and at the attention back ends."""

import os
from pathlib import Path
from typing import Any

import pytest
from doctor_rows import named

from services.diffusion.kernels import FLASH_ATTN
from zimage.doctor import accelerators
from zimage.doctor.attention import attention_rows
from zimage.doctor.row import State


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
        assert named(attention_rows(None), "attention native").state is State.OK

    def test_the_device_counts(self) -> None:
        assert named(attention_rows((7, 5)), "attention cuDNN").state is State.NOTE
        assert named(attention_rows((9, 0)), "attention cuDNN").state is State.OK

    def test_flash_is_missing_where_it_is_asked_for(self) -> None:
        rows = attention_rows(None, wanted=FLASH_ATTN.names)
        assert [row.what for row in rows if row.state is State.MISSING] == ["attention flash"]

    def test_either_flash_will_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("diffusers.models.attention_dispatch._CAN_USE_FLASH_ATTN_3", True)
        rows = attention_rows((9, 0), wanted=FLASH_ATTN.names)
        assert named(rows, "attention flash 3").state is State.OK
        assert named(rows, "attention flash").state is State.NOTE
