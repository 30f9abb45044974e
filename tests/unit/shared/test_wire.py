"""`shared.wire`: its refusals, and that safetensors' own library reads what it writes and the other way round."""

import json
import struct
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.wire import (
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    MAX_RANK,
    MAX_TENSORS,
    Header,
    TensorMeta,
    WireError,
    build_header,
    header_bytes,
    parse_header,
)

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensor_sets = st.dictionaries(names, st.tuples(st.sampled_from(sorted(ITEM_BYTES)), shapes), max_size=6)
metadata_sets = st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=3)


def message(entries: Any, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_header_bytes_of_the_prefix() -> None:
    assert header_bytes(struct.pack("<Q", 16)) == 24


@given(tensor_sets, metadata_sets)
def test_what_is_built_is_parsed(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metas = tuple(TensorMeta(name, dtype, shape) for name, (dtype, shape) in tensors.items())
    built = build_header(metas, metadata)
    header = parse_header(built)
    assert header.data_start == len(built) == header_bytes(built)
    assert header.data_start % 8 == 0
    assert dict(header.metadata) == metadata
    assert set(header.tensors) == set(metas)
    assert header.total_bytes == len(built) + sum(meta.nbytes for meta in metas)
    spans = [header.span(meta.name) for meta in header.tensors]
    edges = [header.data_start, *(span.stop for span in spans)]
    assert [span.start for span in spans] == edges[:-1]
    assert edges[-1] == header.total_bytes


@given(tensor_sets, metadata_sets, st.randoms(use_true_random=False))
def test_safetensors_reads_what_we_write(tensors: dict[str, Any], metadata: dict[str, str], random: Any) -> None:
    metas = [TensorMeta(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    data = {meta.name: random.randbytes(meta.nbytes) for meta in metas}
    if any(meta.dtype == "BOOL" for meta in metas):  # only 0 and 1 are booleans
        data |= {m.name: bytes(b & 1 for b in data[m.name]) for m in metas if m.dtype == "BOOL"}
    read = safetensors.torch.load(build_header(metas, metadata) + b"".join(data[meta.name] for meta in metas))
    assert set(read) == set(data)
    for meta in metas:
        assert read[meta.name].dtype == TORCH_DTYPES[meta.dtype]
        assert tuple(read[meta.name].shape) == meta.shape
        assert read[meta.name].reshape(-1).view(torch.uint8).numpy().tobytes() == data[meta.name]


@given(tensor_sets, metadata_sets)
def test_we_read_what_safetensors_writes(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    values = {name: torch.ones(shape, dtype=TORCH_DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    written = safetensors.torch.save(values, metadata or None)
    header = parse_header(written)
    assert header.total_bytes == len(written)
    assert dict(header.metadata) == metadata
    assert {meta.name: (meta.dtype, meta.shape) for meta in header.tensors} == tensors
    for name, value in values.items():
        assert written[header.span(name)] == value.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_any_buffer_is_parsed_and_the_data_may_be_missing() -> None:
    built = build_header([TensorMeta("text", "BF16", (3, 4))])
    for kind in (bytes, bytearray, memoryview):
        header = parse_header(kind(built))
        assert header.tensors == (TensorMeta("text", "BF16", (3, 4)),)
        assert header.total_bytes == len(built) + 24
    for cut in range(len(built)):
        with pytest.raises(WireError, match=r"shorter than|ends within"):
            parse_header(built[:cut])


def test_absent_names() -> None:
    header = parse_header(build_header([TensorMeta("text", "F32", (1,))]))
    assert header.tensor("text") == TensorMeta("text", "F32", (1,))
    assert header.tensor("negative") is None
    with pytest.raises(KeyError):
        header.span("negative")
    assert Header(()).total_bytes == 0


def test_an_empty_tensor_may_share_its_offset_with_the_next_whatever_the_order() -> None:
    entries = {"full": entry("U8", [2], [0, 2]), "empty": entry("U8", [0], [0, 0])}
    for order in (entries, dict(reversed(entries.items()))):
        header = parse_header(message(order, b"ab"))
        assert [meta.name for meta in header.tensors] == ["empty", "full"]
        assert header.span("full") == slice(header.data_start, header.data_start + 2)


def test_of_a_duplicate_the_last_counts_as_in_safetensors() -> None:
    twice = b'{"a":%s,"a":%s}' % (json.dumps(entry("U8", [9], [0, 9])).encode(), json.dumps(entry()).encode())
    body = message(twice, b"\0" * 8)
    assert parse_header(body).tensors == (TensorMeta("a", "F32", (2,)),)
    assert tuple(safetensors.torch.load(body)["a"].shape) == (2,)


REFUSED: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{nope", "is not JSON"),
    "cut JSON": (b'{"a":', "is not JSON"),
    "not UTF-8": (b'{"\xff": 1}', "is not JSON"),
    "UTF-16": (json.dumps({"a": entry()}).encode("utf-16"), "is not JSON"),
    "UTF-8 with a mark": (b"\xef\xbb\xbf{}", "is not JSON"),
    "nested 100,000 deep": (b"[" * 100_000 + b"]" * 100_000, "is not JSON"),
    "nested in an entry": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not JSON"),
    "a number of 10,000 digits": (b'{"a":' + b"9" * 10_000 + b"}", "is not JSON"),
    "a list": ([], "not an object"),
    "a string": ("text", "not an object"),
    "null": (None, "not an object"),
    "too many tensors": ({f"t{i}": entry("U8", [0], [0, 0]) for i in range(MAX_TENSORS + 2)}, "more than 1024 tensors"),
    "metadata a list": ({"__metadata__": []}, "metadata is not an object of strings"),
    "metadata a number": ({"__metadata__": {"layer": -2}}, "metadata is not an object of strings"),
    "metadata nested": ({"__metadata__": {"a": {"b": "c"}}}, "metadata is not an object of strings"),
    "metadata null": ({"__metadata__": None}, "metadata is not an object of strings"),
    "an entry that is a list": ({"a": []}, "lacks a dtype"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "lacks a dtype"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "lacks a dtype"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, "lacks a dtype"),
    "one offset": ({"a": entry(offsets=[8])}, "lacks a dtype"),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, "lacks a dtype"),
    "fractional offsets": ({"a": entry(offsets=[0.0, 8.0])}, "lacks a dtype"),
    "offsets of true and false": ({"a": entry("U8", [1], [False, True])}, "lacks a dtype"),
    "a dtype that is a number": ({"a": entry(dtype=32)}, "lacks a dtype"),
    "a shape that is a number": ({"a": entry(shape=2)}, "lacks a dtype"),
    "an unknown dtype": ({"a": entry(dtype="F128")}, "unknown dtype 'F128'"),
    "torch's spelling": ({"a": entry(dtype="torch.float32")}, "unknown dtype"),
    "a negative side": ({"a": entry(shape=[-2], offsets=[0, 8])}, "shape"),
    "two negative sides": ({"a": entry(shape=[-1, -2], offsets=[0, 8])}, "shape"),
    "a huge side": ({"a": entry(shape=[1 << 40], offsets=[0, 4 << 40])}, "shape"),
    "a fractional side": ({"a": entry(shape=[2.0])}, "shape"),
    "a side of true": ({"a": entry("U8", [True], [0, 1])}, "shape"),
    "a side of text": ({"a": entry(shape=["2"])}, "shape"),
    "a side of NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "shape"),
    "a rank of 9": ({"a": entry("U8", [1] * (MAX_RANK + 1), [0, 1])}, "at most 8"),
    "a gap before the first": ({"a": entry(offsets=[8, 16])}, "offsets"),
    "a gap between two": ({"a": entry(), "b": entry(offsets=[16, 24])}, "offsets"),
    "an overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, "offsets"),
    "the same place twice": ({"a": entry(), "b": entry()}, "offsets"),
    "less than the shape": ({"a": entry(offsets=[0, 4])}, "offsets"),
    "more than the shape": ({"a": entry(offsets=[0, 12])}, "offsets"),
    "backwards": ({"a": entry(offsets=[8, 0])}, "offsets"),
    "before the data": ({"a": entry(offsets=[-8, 0])}, "offsets"),
    "offsets of an empty tensor": ({"a": entry(shape=[0], offsets=[0, 8])}, "offsets"),
}


@pytest.mark.parametrize(("entries", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(entries: Any, text: str) -> None:
    with pytest.raises(WireError, match=text):
        parse_header(message(entries, b"\0" * 24))


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_that_claims_too_much_is_refused_from_its_first_bytes(length: int) -> None:
    prefix = struct.pack("<Q", length)
    with pytest.raises(WireError, match=f"claims {length} bytes"):
        header_bytes(prefix)
    with pytest.raises(WireError, match="claims"):
        parse_header(prefix)


@pytest.mark.parametrize("size", range(8))
def test_a_body_shorter_than_the_prefix(size: int) -> None:
    with pytest.raises(WireError, match="shorter than a safetensors header"):
        header_bytes(b"\0" * size)


@pytest.mark.parametrize(
    "entries",
    [
        {"\ud800": []},
        {"\ud800": entry(dtype="\ud800")},
        {"\ud800": entry(shape=[-1])},
        {"\ud800": entry(offsets=[1, 2])},
        {"n" * 100_000: []},
        {"a": entry(dtype="d" * 100_000)},
    ],
)
def test_a_refusal_never_echoes_what_cannot_be_sent_or_is_long(entries: Any) -> None:
    with pytest.raises(WireError) as refusal:
        parse_header(message(entries, b"\0" * 8))
    assert str(refusal.value).isascii()
    assert len(str(refusal.value)) < 300


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(body: bytes) -> None:
    try:
        header = parse_header(body)
    except WireError:
        return
    assert header.total_bytes >= header.data_start >= 8


entry_fields = st.dictionaries(
    st.sampled_from(["dtype", "shape", "data_offsets", "other"]),
    st.sampled_from(["F32", "U8", [0, 4], [4], [0, 0], [4, 8], [True], [], None, 3, [1.5, 2]]),
    max_size=4,
)


@given(st.dictionaries(st.text(max_size=5), entry_fields, max_size=3))
def test_random_json_is_parsed_or_refused(entries: Any) -> None:
    try:
        header = parse_header(message(entries, b"\0" * 16))
    except WireError:
        return
    assert {meta.name for meta in header.tensors} == set(entries) - {"__metadata__"}
