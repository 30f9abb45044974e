"""Stored messages: the bytes on the wire are a contract between versions, and with safetensors' own library.

`ours.safetensors` is what `to_chunks` wrote, `theirs.safetensors` the same tensors as safetensors 0.8 wrote them,
`unaligned.safetensors` a legal file whose data begins at an odd offset.
"""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from shared.tensors import from_message, to_chunks
from shared.wire import TensorMeta, build_header, parse_header

GOLDEN = Path(__file__).parent.parent / "golden"
PARAMETERS = {"parameters": '{"width":64,"prompt":"猫"}'}
TENSORS = {
    "text": torch.arange(12, dtype=torch.float32).reshape(3, 4).to(torch.bfloat16),
    "negative": -torch.arange(4, dtype=torch.float32).reshape(1, 4) / 8,
    "empty": torch.zeros(0, 4, dtype=torch.float16),
}
HEADER_HEX = (
    "6000000000000000"  # the header's length
    "7b225f5f6d657461646174615f5f223a7b226c61796572223a222d32227d2c"  # {"__metadata__":{"layer":"-2"},
    "2274657874223a7b226474797065223a2242463136222c227368617065223a5b332c345d2c"  # "text":{"dtype":"BF16",...
    "22646174615f6f666673657473223a5b302c32345d7d7d"  # "data_offsets":[0,24]}}
    "2020202020"
)


def test_the_bytes_of_a_header() -> None:
    assert build_header([TensorMeta("text", "BF16", (3, 4))], {"layer": "-2"}).hex() == HEADER_HEX


def test_we_write_the_stored_message() -> None:
    assert b"".join(to_chunks(TENSORS, PARAMETERS)) == (GOLDEN / "ours.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "metadata"), [("ours", PARAMETERS), ("theirs", {"made_by": "safetensors"}), ("unaligned", {})]
)
def test_both_readers_read_the_stored_messages_alike(name: str, metadata: dict[str, str]) -> None:
    message = bytearray((GOLDEN / f"{name}.safetensors").read_bytes())
    header = parse_header(message)
    assert header.total_bytes == len(message)
    assert dict(header.metadata) == metadata
    theirs = safetensors.torch.load(bytes(message))
    expected = {"text": torch.tensor([[1.5, -2.0]])} if name == "unaligned" else TENSORS
    assert {meta.name for meta in header.tensors} == set(theirs) == set(expected)
    for key, value in expected.items():
        ours = from_message(message, header, key)
        assert ours.dtype == theirs[key].dtype == value.dtype
        assert ours.shape == theirs[key].shape == value.shape
        assert torch.equal(ours, value)
        assert torch.equal(theirs[key], value)
