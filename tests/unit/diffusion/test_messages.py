"""`services.diffusion.messages`: what is refused, and that it is refused before the tensors are read."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from fakes import embeddings, message, parameters
from hypothesis import given
from hypothesis import strategies as st

from services.diffusion.messages import MAX_TEXT_TOKENS, judge_header, read_message
from services.diffusion.parts import ModelFacts
from shared.errors import InvalidField, MalformedBody, ServiceError
from shared.schemas.diffusion import DiffusionParameters
from shared.wire import Header, TensorMeta, build_header, parse_header

FACTS = ModelFacts(device="cpu", dtype="float32", text_width=64, text_limit=1504, max_width_px=8192, max_height_px=8192)
JUDGE = partial(judge_header, facts=FACTS, max_pixels=4_200_000)


class Body:
    """A body that comes in pieces and remembers how much of it was taken."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.pieces, self.taken = pieces, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            self.taken += len(piece)
            yield piece


async def read(body: bytes, piece: int = 1 << 16) -> tuple[bytearray, Header, DiffusionParameters]:
    pieces = [body[start : start + piece] for start in range(0, len(body), piece)] or [b""]
    return await read_message(Body(pieces).__aiter__(), JUDGE)


@pytest.mark.parametrize("piece", [1, 7, 8, 9, 100, 1 << 16])
async def test_a_message_in_pieces_of_any_size(piece: int) -> None:
    body = message(seed=11)
    whole, header, wanted = await read(body, piece)
    assert bytes(whole) == body
    assert header == parse_header(body)
    assert wanted == parameters(seed=11)


async def test_one_piece_that_is_empty_between_others() -> None:
    body = message()
    whole, _, _ = await read_message(Body([b"", body[:20], b"", body[20:], b""]).__aiter__(), JUDGE)
    assert bytes(whole) == body


def one(dtype: str = "F32", shape: tuple[int, ...] = (20, 64), **more: TensorMeta) -> list[TensorMeta]:
    return [TensorMeta("text", dtype, shape), *more.values()]


def header_only(metas: list[TensorMeta], wanted: Any = None) -> bytes:
    text = wanted if isinstance(wanted, str) else (wanted or parameters()).model_dump_json()
    return build_header(metas, {"parameters": text})


REFUSED_TENSORS = {
    "wrong width": (one(shape=(20, 63)), r"'text' must have the shape \[tokens, 64\], not \[20, 63\]"),
    "published width": (one(shape=(20, 2560)), "'text' must have the shape"),
    "rank 3": (one(shape=(1, 20, 64)), "'text' must have the shape"),
    "rank 1": (one(shape=(64,)), "'text' must have the shape"),
    "rank 0": (one(shape=()), "'text' must have the shape"),
    "int8": (one("I8"), "'text' must be one of BF16, F32, F16, not I8"),
    "float64": (one("F64"), "'text' must be one of"),
    "float8": (one("F8_E4M3"), "'text' must be one of"),
    "booleans": (one("BOOL"), "'text' must be one of"),
    "no rows": (one(shape=(0, 64)), f"'text' must have 1 to {MAX_TEXT_TOKENS} tokens, not 0"),
    "a million rows": (one(shape=(1_000_000, 64)), "'text' must have 1 to .* tokens, not 1000000"),
    "one row too many": (one(shape=(MAX_TEXT_TOKENS + 1, 64)), "'text' must have 1 to"),
    "a huge claim": (one(shape=(1 << 39, 64)), "'text' must have 1 to"),
    "no text": ([TensorMeta("prompt", "F32", (20, 64))], "'text' is required"),
    "nothing": ([], "'text' is required"),
}


@pytest.mark.parametrize(("metas", "text"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS.keys())
async def test_tensors_are_refused_before_their_bytes_are_read(metas: list[TensorMeta], text: str) -> None:
    body = Body([header_only(metas), *[b"\0" * 1000] * 100])
    with pytest.raises(InvalidField, match=text):
        await read_message(body.__aiter__(), JUDGE)
    assert body.taken < 2_000


GUIDED = parameters(guidance_scale=3.0)


@pytest.mark.parametrize(
    ("metas", "text"),
    [
        (one(), "'negative' is required"),
        (one(negative=TensorMeta("negative", "F32", (5, 63))), "'negative' must have the shape"),
        (one(negative=TensorMeta("negative", "I8", (5, 64))), "'negative' must be one of"),
        (one(negative=TensorMeta("negative", "F32", (0, 64))), "'negative' must have 1 to"),
        (one(negative=TensorMeta("negative", "F32", (1_000_000, 64))), "'negative' must have 1 to"),
    ],
)
async def test_with_guidance_the_negative_is_judged_too(metas: list[TensorMeta], text: str) -> None:
    with pytest.raises(InvalidField, match=text):
        await read(header_only(metas, GUIDED))


def test_without_guidance_the_negative_does_not_matter() -> None:
    metas = one(negative=TensorMeta("negative", "I8", (0, 3)))
    assert JUDGE(parse_header(header_only(metas))) == parameters()


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
@pytest.mark.parametrize("tokens", [1, 1504, MAX_TEXT_TOKENS])
def test_what_the_model_takes(dtype: str, tokens: int) -> None:
    assert JUDGE(parse_header(header_only(one(dtype, (tokens, 64))))) == parameters()


REFUSED_PARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "width 0": ({"width": 0}, "'width'"),
    "height 100": ({"height": 100}, "'height' must be a multiple of 16."),
    "steps 101": ({"steps": 101}, "'steps' must be at most 100."),
    "seed -1": ({"seed": -1}, "'seed'"),
    "seed 2**63": ({"seed": 2**63}, "'seed'"),
    "guidance -1": ({"guidance_scale": -1}, "'guidance_scale'"),
    "shift 0": ({"shift": 0}, "'shift'"),
    "mode": ({"long_prompt_mode": "squeeze"}, "'long_prompt_mode'"),
    "null": ({"steps": None}, "'steps'"),
    "text": ({"steps": "4"}, "'steps'"),
    "unknown": ({"hight": 4}, "'hight'"),
    "too many pixels": ({"width": 4096, "height": 4096}, "'width' times 'height' must be at most 4200000 pixels"),
    "one row of pixels too many": ({"width": 2064, "height": 2048}, "must be at most 4200000 pixels, not 4227072"),
}


@pytest.mark.parametrize(("raw", "text"), REFUSED_PARAMETERS.values(), ids=REFUSED_PARAMETERS.keys())
async def test_parameters_that_are_wrong(raw: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidField, match=text):
        await read(message(raw=raw))


@pytest.mark.parametrize(("field", "longest"), [("width", 96), ("height", 64)])
def test_a_side_beyond_the_models_positions(field: str, longest: int) -> None:
    facts = replace(FACTS, max_width_px=96, max_height_px=64)
    largest = parameters(width=96, height=64)
    assert judge_header(parse_header(header_only(one(), largest)), facts, max_pixels=1 << 20) == largest
    beyond = largest.model_copy(update={field: longest + 16})
    with pytest.raises(InvalidField) as refused:
        judge_header(parse_header(header_only(one(), beyond)), facts, max_pixels=1 << 20)
    assert refused.value.detail == f"'{field}' must be at most {longest} pixels for this model, not {longest + 16}."


@pytest.mark.parametrize("field", [name for name, one in DiffusionParameters.model_fields.items() if one.is_required()])
async def test_parameters_that_are_missing(field: str) -> None:
    fields = json.loads(parameters().model_dump_json())
    del fields[field]
    with pytest.raises(InvalidField, match=f"'{field}' is required"):
        await read(header_only(one(), json.dumps(fields)))


async def test_no_parameters_at_all() -> None:
    with pytest.raises(InvalidField, match="metadata entry 'parameters' is required"):
        await read(build_header(one()) + b"\0" * 20 * 64 * 4)


@pytest.mark.parametrize("text", ["{", "", "width=64", "[" * 100_000, "{\ud800}"])
async def test_parameters_that_are_not_json(text: str) -> None:
    header = {
        "__metadata__": {"parameters": text},
        "text": {"dtype": "F32", "shape": [1, 64], "data_offsets": [0, 256]},
    }
    encoded = json.dumps(header).encode()
    with pytest.raises(MalformedBody, match="is not JSON"):
        await read(struct.pack("<Q", len(encoded)) + encoded)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"'])
async def test_parameters_that_are_no_object(text: str) -> None:
    with pytest.raises(InvalidField):
        await read(header_only(one(), text))


async def test_a_long_unknown_parameter_is_not_echoed_whole() -> None:
    with pytest.raises(InvalidField) as refused:
        await read(message(raw={"x" * 100_000: 1}))
    assert len(refused.value.detail) < 300


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"short",
        b"\x00" * 8,
        b"\xff" * 8,
        b"PNG" * 100,
        message()[:-1],
        message() + b"\0",
        message()[:200],
        struct.pack("<Q", 1 << 40),
        struct.pack("<Q", 3) + b"{{{",
    ],
    ids=["empty", "short", "zeros", "ones", "noise", "cut", "longer", "cut header", "huge header", "no JSON"],
)
async def test_bodies_that_are_no_message(body: bytes) -> None:
    with pytest.raises((InvalidField, MalformedBody)) as refused:
        await read(body)
    refused.value.detail.encode()


async def test_a_body_that_goes_on_is_not_read_to_its_end() -> None:
    body = Body([message(), *[b"\0" * 1000] * 1000])
    with pytest.raises(InvalidField, match="shorter or longer than its header says"):
        await read_message(body.__aiter__(), JUDGE)
    assert body.taken <= len(message()) + 1000


async def test_names_that_cannot_be_encoded() -> None:
    text = '{"\\ud800":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}'
    with pytest.raises(InvalidField) as refused:
        await read(struct.pack("<Q", len(text)) + text.encode())
    refused.value.detail.encode()


def test_tensors_of_no_use_are_not_refused() -> None:
    """A newer gateway may send more than this version reads."""
    metas = one(vl=TensorMeta("vl", "F32", (3, 64)))
    assert JUDGE(parse_header(header_only(metas))) == parameters()


@given(st.binary(max_size=300), st.integers(0, 400), st.sampled_from([1, 50, 1000]))
def test_a_damaged_message_is_refused_or_read_but_never_breaks(noise: bytes, place: int, piece: int) -> None:
    body = bytearray(message(tensors={"text": embeddings(1)}))
    body[place : place + len(noise)] = noise
    try:
        whole, header, _ = asyncio.run(read(bytes(body), piece))
    except ServiceError as error:
        assert error.status in {400, 422}
        error.detail.encode()
    else:
        assert len(whole) == header.total_bytes


def test_the_embeddings_of_the_tests_are_what_the_model_reads() -> None:
    assert parse_header(message()).tensor("text") == TensorMeta("text", "F32", (20, 64))
    assert embeddings(3).dtype == torch.float32
