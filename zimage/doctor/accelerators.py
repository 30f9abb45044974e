"""What torch finds to compute on, or why it finds nothing; takes torch itself as an argument."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from zimage.doctor.row import Row, note, ok

DRIVER_FILE = Path("/proc/driver/nvidia/version")
PROBE_TIMEOUT_S = 15.0
BF16_MACOS = 14


def torch_row(torch: Any) -> Row:
    """The build of torch."""
    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built = [f"{name} {number}" for name, number in builds.items() if number]
    return ok("torch", f"{torch.__version__}, built for {' and '.join(built) or 'the CPU'}")


def cuda_rows(torch: Any) -> list[Row]:
    """A row for each CUDA device, or one that says why there is none."""
    available, warned = _cuda_available(torch)
    if not available:
        return [_no_cuda_row(torch, warned)]
    return [_device_row(torch, number) for number in range(torch.cuda.device_count())]


def mps_row(torch: Any) -> Row:
    """Apple's GPU."""
    if torch.backends.mps.is_available():
        return ok("MPS", "available")
    return note("MPS", "none: it takes a Mac with Apple silicon" if sys.platform == "linux" else "not available")


def bf16_row(torch: Any, device: str) -> Row:
    """Whether the device that draws computes in bfloat16, the number format of the published weights."""
    what = "bfloat16"
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "mps":
        native = torch.backends.mps.is_macos_or_newer(BF16_MACOS, 0)
    else:
        instructions = torch.cpu.get_capabilities()
        native = any(instructions.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))
    if native:
        return ok(what, f"the {device} device computes in it")
    return note(what, f"the {device} device only emulates it, which is slow", "set ZIMAGE_DIFFUSION_DTYPE=float32")


def driver_version() -> str | None:
    """The NVIDIA driver's version, None where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program:
        try:
            done = subprocess.run(  # noqa: S603 - the program of the driver
                [program, "--query-gpu=driver_version", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=PROBE_TIMEOUT_S,
                check=True,
            )
            return done.stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            pass
    return "of unknown version" if program or DRIVER_FILE.exists() else None


def _cuda_available(torch: Any) -> tuple[bool, str]:
    """Whether CUDA can be used, and what torch warned of while it looked (a driver that is too old, say)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = bool(torch.cuda.is_available())
    return available, str(caught[0].message).splitlines()[0] if caught else ""


def _no_cuda_row(torch: Any, warned: str) -> Row:
    driver = driver_version()
    if not torch.version.cuda and not torch.version.hip:
        if driver is None:
            return note("CUDA", "none: no NVIDIA driver here, and torch is built for the CPU")
        todo = "install torch's CUDA build: ZIMAGE_TORCH=cuda, with a new .venv, and `make install`"
        return note("CUDA", f"none: torch is built for the CPU, though the NVIDIA driver is here ({driver})", todo)
    if driver is None:
        return note("CUDA", "none: no NVIDIA driver here", "install the driver, or pass the GPU into the container")
    todo = "see what `nvidia-smi` says, and whether CUDA_VISIBLE_DEVICES hides the GPU"
    return note("CUDA", f"none: {warned or 'torch finds no device'} (driver {driver})", todo)


def _device_row(torch: Any, number: int) -> Row:
    device = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    return ok(
        f"CUDA {number}",
        f"{device.name}, {decimal(free)} free of {decimal(total)}, compute capability {device.major}.{device.minor}, "
        f"driver {driver_version() or 'unknown'}",
    )
