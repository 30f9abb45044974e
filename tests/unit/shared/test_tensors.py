"""`shared.tensors`: bytes and back without a copy, and the choice of device and dtype."""

import struct
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.checkpoint import UnusableModel
from shared.errors import OutOfMemory
from shared.settings import Device, Dtype
from shared.tensors import (
    DTYPES,
    data_of,
    dtype_of,
    free_memory,
    from_message,
    is_out_of_memory,
    pick_device,
    to_chunks,
    within_memory,
)
from shared.wire import parse_header

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))
NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")
FLOATS = [torch.bfloat16, torch.float32, torch.float16, torch.float64]


def address(view: memoryview | bytearray) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def test_every_dtype_has_one_name() -> None:
    assert set(DTYPES.values()) == set(FLOATS)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7,), (), (2, 3, 4), (0, 64), (3, 0)])
def test_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    message = bytearray(b"".join(to_chunks({"text": tensor})))
    header = parse_header(message)
    assert header.total_bytes == len(message)
    back = from_message(message, header, "text")
    assert back.dtype == dtype
    assert back.shape == shape
    assert torch.equal(back, tensor)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.sampled_from(FLOATS), st.integers(0, 1 << 30))
def test_safetensors_reads_the_chunks(shape: list[int], dtype: torch.dtype, seed: int) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert torch.equal(safetensors.torch.load(b"".join(to_chunks({"a": tensor})))["a"], tensor)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_is_copied_on_the_way_out(dtype: torch.dtype) -> None:
    tensor = torch.ones(4, 8, dtype=dtype)
    _, data = to_chunks({"text": tensor})
    assert address(data) == tensor.data_ptr()
    assert data.nbytes == len(data) == tensor.nbytes


@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_is_copied_on_the_way_in(dtype: torch.dtype) -> None:
    message = bytearray(b"".join(to_chunks({"a": torch.ones(3, dtype=dtype), "text": torch.ones(2, 4, dtype=dtype)})))
    header = parse_header(message)
    tensor = from_message(message, header, "text")
    assert tensor.data_ptr() == address(message) + header.span("text").start


def test_a_view_keeps_its_tensor_alive() -> None:
    view = data_of(torch.arange(1000, dtype=torch.float32))
    churn = [torch.full((1000,), float(n)) for n in range(50)]
    assert torch.equal(torch.frombuffer(view, dtype=torch.float32), torch.arange(1000, dtype=torch.float32))
    assert len(churn) == 50


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[:, ::2],
        lambda t: t[1:3, 2:5],
        lambda t: t[:1].expand(4, 6),
        lambda t: t.requires_grad_(),
    ],
    ids=["transposed", "strided", "sliced", "expanded", "with gradient"],
)
def test_tensors_that_are_not_contiguous(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = view(torch.arange(24, dtype=torch.float32).reshape(4, 6))
    message = bytearray(b"".join(to_chunks({"text": tensor})))
    assert torch.equal(from_message(message, parse_header(message), "text"), tensor.detach())


def test_slices_of_rows_are_contiguous_and_not_copied() -> None:
    tensor = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    _, data = to_chunks({"text": tensor[1:3]})
    assert address(data) == tensor[1].data_ptr()


@pytest.mark.parametrize("padding", range(8))
@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
def test_data_at_any_offset(padding: int, name: str, dtype: torch.dtype) -> None:
    """A foreign header need not end on a boundary of eight bytes."""
    tensor = torch.tensor([[1.5, -2.0, 0.25]], dtype=dtype)
    entry = f'{{"text":{{"dtype":"{name}","shape":[1,3],"data_offsets":[0,{tensor.nbytes}]}}}}' + " " * padding
    message = bytearray(struct.pack("<Q", len(entry)) + entry.encode() + bytes(data_of(tensor)))
    assert torch.equal(from_message(message, parse_header(message), "text"), tensor)


def test_several_tensors_of_several_dtypes() -> None:
    tensors = {f"t{n}": torch.full((n, 3), float(n), dtype=FLOATS[n % 4]) for n in range(8)}
    message = bytearray(b"".join(to_chunks(tensors, {"layer": "-2"})))
    header = parse_header(message)
    assert header.metadata == {"layer": "-2"}
    for name, tensor in tensors.items():
        assert torch.equal(from_message(message, header, name), tensor)


def test_an_unknown_name() -> None:
    message = bytearray(b"".join(to_chunks({"text": torch.ones(1)})))
    with pytest.raises(KeyError, match="negative"):
        from_message(message, parse_header(message), "negative")


@pytest.mark.parametrize(
    ("wanted", "checkpoint", "expected"),
    [
        (Dtype.AUTO, "bfloat16", torch.bfloat16),
        (Dtype.AUTO, "float32", torch.float32),
        (Dtype.AUTO, "float64", torch.float32),
        (Dtype.AUTO, "float16", torch.bfloat16),
        (Dtype.FLOAT32, "bfloat16", torch.float32),
        (Dtype.BFLOAT16, "float32", torch.bfloat16),
        (Dtype.FLOAT32, "float16", torch.float32),
    ],
)
def test_the_dtype_to_compute_in(wanted: Dtype, checkpoint: str, expected: torch.dtype) -> None:
    assert dtype_of(wanted, checkpoint) == expected
    on_gpu = torch.bfloat16 if wanted is Dtype.AUTO else expected
    assert {dtype_of(wanted, checkpoint, torch.device(kind)) for kind in ("cuda", "mps")} == {on_gpu}


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_best_device(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, mps: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device(Device.AUTO) == torch.device(expected)
    assert pick_device(Device.CPU) == torch.device("cpu")


@pytest.mark.parametrize("device", [Device.CUDA, Device.MPS])
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UnusableModel, match=f"the device '{device}' is asked for"):
        pick_device(device)


def failing(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=repr,
)
def test_an_allocation_that_fails_is_told_as_too_little_memory(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(OutOfMemory, match="too little free memory for this text") as told:
        within_memory(CPU, failing(error), what="text")
    assert told.value.retry_after_s
    assert told.value.__context__ is None


@pytest.mark.parametrize("error", [RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"), ValueError("memory"), NO_ENGINE])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as raised:
        within_memory(CPU, failing(error), what="text")
    assert raised.value is error


@pytest.mark.parametrize(
    ("free", "total", "full"),
    [
        ((1 << 30) - 1, 8 << 30, True),
        (1 << 30, 8 << 30, False),
        (4 << 30, 100 << 30, True),
        (5 << 30, 100 << 30, False),
        (None, 8 << 30, False),
        (0, None, False),
    ],
)
def test_cudnn_without_an_engine_is_short_of_memory_only_where_the_device_is_full(
    monkeypatch: pytest.MonkeyPatch, free: int | None, total: int | None, *, full: bool
) -> None:
    """It says the same of what it cannot compute at all."""
    monkeypatch.setattr("shared.tensors.free_memory", lambda _: free)
    monkeypatch.setattr("shared.tensors.total_memory", lambda _: total)
    with pytest.raises(OutOfMemory if full else RuntimeError, match="memory" if full else "unable to find"):
        within_memory(CUDA, failing(NO_ENGINE), what="picture")
    with pytest.raises(RuntimeError, match="shapes"):
        within_memory(CUDA, failing(RuntimeError("shapes do not match")), what="picture")


def test_on_a_mac_what_torch_keeps_for_its_next_tensors_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10_000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 9_000)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 4_000)
    assert free_memory(MPS) == 6_000


@pytest.mark.parametrize(("device", "emptied"), [(MPS, ["mps"]), (CUDA, ["cuda"]), (CPU, [])], ids=str)
def test_a_device_that_is_full_gets_back_what_torch_kept(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, emptied: list[str]
) -> None:
    calls: list[str] = []
    for kind in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "empty_cache", lambda kind=kind: calls.append(kind))
    assert within_memory(device, lambda: 5, what="picture") == 5
    assert calls == []
    with pytest.raises(OutOfMemory):
        within_memory(device, failing(torch.OutOfMemoryError("out of memory")), what="picture")
    assert calls == emptied
