"""The only torch in `shared`: devices and dtypes, what fits there, and tensors as safetensors bytes, uncopied."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from shared.checkpoint import UnusableModel, weight_bytes
from shared.errors import OutOfMemory
from shared.settings import Device, Dtype, Quantization
from shared.wire import Header, TensorMeta, build_header

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DEVICE_ERROR = torch.AcceleratorError
"""An error of the driver, as a CUDA assert: after it every call of the device fails."""
INSTALL_TORCHAO = "`ZIMAGE_EXTRAS=quantization make install` adds it (to images: the same variable);"
CPU = torch.device("cpu")
QUANTIZED_SHARE = 1.15  # bytes of a quantized checkpoint for each of its numbers: scales, and what stays as it is
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")
_NO_ENGINE = "unable to find an engine to execute this computation"
"""What torch says when cuDNN can compute a convolution in none of its ways: it knows none, or none has the memory."""
SCARCE_BYTES, SCARCE_SHARE = 1 << 30, 0.05
"""A device with less free memory, in bytes or of all that it has, is taken to be full."""
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

T = TypeVar("T")


def to_chunks(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> list[memoryview]:
    """The message for these tensors as its header and a view of each tensor's memory, to be sent in this order.

    Tensors are moved to the CPU and made contiguous where they are not; apart from that nothing is copied.
    """
    host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    metas = [TensorMeta(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in host.items()]
    return [memoryview(build_header(metas, metadata)), *(data_of(tensor) for tensor in host.values())]


def data_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, as a view that keeps the tensor alive."""
    array: np.ndarray[Any, Any] = tensor.reshape(-1).view(torch.uint8).numpy()
    return array.data


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    """What `--debug` prints of embeddings, to compare two back ends: shape, dtype, statistics, some values."""
    numbers = tensor.detach().to("cpu", torch.float32)
    values = numbers.reshape(-1)
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype),
        "min": numbers.min().item(),
        "max": numbers.max().item(),
        "mean": numbers.mean().item(),
        "std": numbers.std().item(),
        "first_5": [round(value, 6) for value in values[:5].tolist()],
        "last_5": [round(value, 6) for value in values[-5:].tolist()],
    }


def from_message(message: bytearray | memoryview, header: Header, name: str) -> torch.Tensor:
    """The tensor of that name, sharing the message's memory, which must be writable.

    Raises KeyError for an unknown name; the dtype must be one of `DTYPES` and is checked by the caller.
    """
    meta = header.tensor(name)
    if meta is None:
        raise KeyError(name)
    if not meta.nbytes:
        return torch.empty(meta.shape, dtype=DTYPES[meta.dtype])
    span = header.span(name)
    count = (span.stop - span.start) // torch.empty((), dtype=DTYPES[meta.dtype]).element_size()
    return torch.frombuffer(message, dtype=DTYPES[meta.dtype], count=count, offset=span.start).reshape(meta.shape)


def pick_device(wanted: Device) -> torch.device:
    """The device; auto is CUDA, else MPS, else the CPU. Raises UnusableModel when this machine lacks it."""
    if wanted is Device.AUTO:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    available = {
        Device.CPU: True,
        Device.CUDA: torch.cuda.is_available(),
        Device.MPS: torch.backends.mps.is_available(),
    }
    if not available[wanted]:
        raise UnusableModel(f"the device '{wanted}' is asked for, but torch {torch.__version__} finds none here")
    return torch.device(wanted.value)


def dtype_of(wanted: Dtype, checkpoint: str, device: torch.device = CPU) -> torch.dtype:
    """The dtype to compute in; `checkpoint` is the stored one, as `shared.checkpoint.checkpoint_dtype` names it.

    A GPU computes in bfloat16 unless it is told otherwise: the published DiT is stored in float32, which takes twice
    the memory and several times as long. A float16 checkpoint is widened to bfloat16: Z-Image overflows in float16
    and draws black pictures.
    """
    stored = checkpoint if device.type == "cpu" else "bfloat16"
    name = stored if wanted is Dtype.AUTO else wanted.value
    return {"float32": torch.float32, "float64": torch.float32}.get(name, torch.bfloat16)


def quantize(
    module: torch.nn.Module,
    kind: Quantization,
    device: torch.device,
    *,
    flag: str,
    wanted: Callable[[torch.nn.Module, str], bool],
) -> None:
    """Brings the module to the device with the weights of the wanted layers in fewer bits, by torchao, a layer at a
    time: where there is no room for all weights as they are. `wanted` is asked with layer and name.

    Raises UnusableModel, whose sentence names the flag, where the device or the package for it is missing.
    """
    if kind is Quantization.NONE:
        return
    if device.type not in ("cpu", "cuda"):
        raise UnusableModel(f"{flag} runs on the CPU and on NVIDIA GPUs, not on '{device}': leave it out")
    if kind is Quantization.FP8_DYNAMIC and not _multiplies_fp8(device):
        raise UnusableModel(
            f"{flag} needs an NVIDIA GPU of compute capability 8.9 or newer: choose fp8 or int8_dynamic"
        )
    try:
        from torchao import quantization as torchao
    except ImportError:
        raise UnusableModel(f"{flag} needs the package torchao: {INSTALL_TORCHAO} else leave it out") from None
    recipe = {
        Quantization.INT8: torchao.Int8WeightOnlyConfig,
        Quantization.INT8_DYNAMIC: torchao.Int8DynamicActivationInt8WeightConfig,
        Quantization.FP8: torchao.Float8WeightOnlyConfig,
        # a scale for each row, not for a tensor: what shares a forward must not change each other
        Quantization.FP8_DYNAMIC: partial(
            torchao.Float8DynamicActivationFloat8WeightConfig, granularity=torchao.PerRow()
        ),
    }[kind]
    torchao.quantize_(module, recipe(), filter_fn=wanted, device=device)


def loaded_bytes(folder: Path, dtype: torch.dtype, quantization: Quantization = Quantization.NONE) -> int:
    """Bytes of a folder's weights once loaded; in fewer bits about a byte for each number. Raises UnusableModel."""
    whole = weight_bytes(folder, dtype.itemsize)
    if quantization is Quantization.NONE:
        return whole
    return min(whole, int(QUANTIZED_SHARE * weight_bytes(folder, 1)))


def bytes_of(weight: torch.Tensor) -> int:
    """Bytes that a weight takes; torchao's own say what they stand for."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()
    return sum(bytes_of(getattr(weight, name)) for name in names)


def require_memory(device: torch.device, needed: int, *, what: str, advice: str) -> None:
    """Raises UnusableModel when the device has fewer than `needed` bytes free; `advice` says what to do instead."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise UnusableModel(
            f"{what} takes {needed / 1e9:.3g} GB, but the device '{device}' has only {free / 1e9:.3g} GB free: {advice}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or in main memory; what is there is as it was, and less may still fit.

    That cuDNN or cuBLAS could not allocate counts too, where they say so.
    """
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in _OUT_OF_MEMORY)


def within_memory(device: torch.device, work: Callable[[], T], *, what: str) -> T:
    """Does the work for a `what`. Raises OutOfMemory once nothing holds on to the work's tensors any more."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not (is_out_of_memory(error) or _is_starved(error, device)):
            raise
    # Here the error is gone, and with it the frames that held the tensors.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    raise OutOfMemory(f"The device has too little free memory for this {what}.", retry_after_s=10)


def total_memory(device: torch.device) -> int | None:
    """Bytes that the device has in all, or that a container allows; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return host_memory_limit()


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, None where that cannot be told.

    What torch keeps of freed tensors for its next ones counts as free.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return host_memory()


def host_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of main memory that a process can still have on Linux: what the machine has and its container allows."""
    free = _fields(meminfo).get("MemAvailable:")
    if free is None:
        return None
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, no version 2 of control groups, or no limit ("max")
        return free * 1024
    cache = _fields(cgroup / "memory.stat")  # files that the kernel drops from memory when it needs it
    return min(free * 1024, limit - used + cache.get("inactive_file", 0) + cache.get("active_file", 0))


def host_memory_limit(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of main memory in all on Linux: the machine's, or what its container allows."""
    total = _fields(meminfo).get("MemTotal:")
    if total is None:
        return None
    try:
        return min(total * 1024, int((cgroup / "memory.max").read_text()))
    except (OSError, ValueError):  # no container, or no limit ("max")
        return total * 1024


def _is_starved(error: BaseException, device: torch.device) -> bool:
    """Whether cuDNN found no way to compute because the device is full: where it is not, cuDNN knows none."""
    if _NO_ENGINE not in str(error).lower():
        return False
    free, total = free_memory(device), total_memory(device)
    return free is not None and total is not None and free < max(SCARCE_BYTES, SCARCE_SHARE * total)


def _multiplies_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _fields(table: Path) -> dict[str, int]:
    try:
        lines = [line.split() for line in table.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
