"""Tensors on the wire: reads and writes safetensors headers with the standard library alone.

The layout is that of https://huggingface.co/docs/safetensors: eight bytes little-endian with the length of a JSON
header, the header, then the tensors' bytes. This module never looks at those bytes and never copies them; only
`shared.tensors` turns them into tensors.
"""

import io
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

MEDIA_TYPE = "application/vnd.safetensors"
PREFIX_BYTES = 8
MAX_HEADER_BYTES = 1 << 20  # of a message; a file may say more, as it names every tensor of a model
MAX_TENSORS = 1024
MAX_FILE_HEADER_BYTES = 100 << 20  # the limit of safetensors itself
MAX_RANK = 8
ALIGNMENT = 8  # safetensors pads its header with spaces so that the data begins on such a boundary

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 1,
        "U8": 1,
        "I8": 1,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
        "I16": 2,
        "U16": 2,
        "F16": 2,
        "BF16": 2,
        "I32": 4,
        "U32": 4,
        "F32": 4,
        "I64": 8,
        "U64": 8,
        "F64": 8,
    }
)


class WireError(ValueError):
    """The bytes are no well-formed safetensors; the text is ours and may be shown to a client."""


class TensorMeta(NamedTuple):
    """Name, dtype (safetensors' spelling, "BF16") and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: `tensors` in the order of their bytes, `data_start` the offset of the first byte of data."""

    tensors: tuple[TensorMeta, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    data_start: int = 0

    @property
    def total_bytes(self) -> int:
        """Length of the whole message in bytes."""
        return self.data_start + sum(tensor.nbytes for tensor in self.tensors)

    def tensor(self, name: str) -> TensorMeta | None:
        """The tensor of that name, or None."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)

    def span(self, name: str) -> slice:
        """Where the tensor's bytes stand in the message. Raises KeyError when there is none of that name."""
        start = self.data_start
        for tensor in self.tensors:
            if tensor.name == name:
                return slice(start, start + tensor.nbytes)
            start += tensor.nbytes
        raise KeyError(name)


def build_header(tensors: Sequence[TensorMeta], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes that go before the tensors' data, which must follow in the order given."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def header_bytes(prefix: bytes | bytearray | memoryview, *, limit: int = MAX_HEADER_BYTES) -> int:
    """Length of prefix and header together, read from the first eight bytes. Raises WireError beyond `limit`."""
    if len(prefix) < PREFIX_BYTES:
        raise WireError("the body is shorter than a safetensors header")
    (length,) = struct.unpack_from("<Q", prefix)
    if length > limit:
        raise WireError(f"the safetensors header claims {length} bytes, the limit is {limit}")
    return PREFIX_BYTES + int(length)


def parse_header(message: bytes | bytearray | memoryview) -> Header:
    """Reads the header at the start of a message, of which the data may still be missing. Raises WireError."""
    end = header_bytes(message)
    if len(message) < end:
        raise WireError("the body ends within the safetensors header")
    header = _parse(bytes(message[PREFIX_BYTES:end]))
    if len(header.tensors) > MAX_TENSORS:
        raise WireError(f"the safetensors header names more than {MAX_TENSORS} tensors")
    return header


def read_file_header(file: BinaryIO) -> Header:
    """Reads the header of an open safetensors file. Raises WireError, also when the file's length is another."""
    prefix = file.read(PREFIX_BYTES)
    end = header_bytes(prefix, limit=MAX_FILE_HEADER_BYTES)
    header = _parse(file.read(end - PREFIX_BYTES))
    size = file.seek(0, io.SEEK_END)
    if size != header.total_bytes:
        fault = "truncated" if size < header.total_bytes else "too long"
        raise WireError(f"it is {fault}: {size} bytes instead of {header.total_bytes}")
    return header


def _parse(text: bytes) -> Header:
    try:
        entries = json.loads(text.decode())
    except (ValueError, RecursionError):
        raise WireError("the safetensors header is not JSON") from None
    if not isinstance(entries, dict):
        raise WireError("the safetensors header is not an object")
    metadata = _parse_metadata(entries.pop("__metadata__", {}))
    parsed = sorted((_parse_entry(name, entry) for name, entry in entries.items()), key=lambda item: item[1:])
    offset = 0
    for meta, start, stop in parsed:
        if start != offset or stop - start != meta.nbytes:
            raise WireError(f"the offsets of tensor {meta.name[:64]!a} overlap, leave a gap or do not fit its shape")
        offset = stop
    return Header(tensors=tuple(meta for meta, _, _ in parsed), metadata=metadata, data_start=PREFIX_BYTES + len(text))


def _parse_metadata(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise WireError("the safetensors metadata is not an object of strings")
    return MappingProxyType(value)


def _parse_entry(name: str, entry: Any) -> tuple[TensorMeta, int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]} if (
            type(start) is int and type(stop) is int
        ):
            pass
        case _:
            raise WireError(f"tensor {name[:64]!a} lacks a dtype, a shape or its offsets")
    if dtype not in ITEM_BYTES:
        raise WireError(f"tensor {name[:64]!a} has the unknown dtype {dtype[:64]!a}")
    if len(shape) > MAX_RANK or not all(type(side) is int and 0 <= side < 1 << 40 for side in shape):
        raise WireError(f"tensor {name[:64]!a} has a shape that is not at most {MAX_RANK} whole numbers")
    return TensorMeta(name, dtype, tuple(shape)), start, stop
