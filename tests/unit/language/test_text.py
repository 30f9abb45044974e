"""`TextStream`: the pieces make the whole, special tokens are left out, stop strings end it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from shared.language.marks import held_back
from shared.language.text import TextStream


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_checkpoint / "tokenizer" / "tokenizer.json"))


def pieces(tokenizer: Tokenizer, text: str, *stop: str) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    told = []
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        told.append(stream.add(token))
        if stream.stopped:
            break
    return [*told, stream.end()], stream


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_the_pieces_make_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(pieces(tokenizer, text)[0]) == tokenizer.decode(ids)


def test_no_piece_holds_half_a_character(tokenizer: Tokenizer) -> None:
    told, _ = pieces(tokenizer, "两只猫 🐈 sleeping")
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in told)
    assert "".join(told) == "两只猫 🐈 sleeping"


def test_special_tokens_are_left_out_and_think_tags_are_not(tokenizer: Tokenizer) -> None:
    told, _ = pieces(tokenizer, "<|im_start|><think>a</think>b<|im_end|><|endoftext|>")
    assert "".join(told) == "<think>a</think>b"


@pytest.mark.parametrize("stop", ["STOP", "S", "TOP or no", " STO"])
def test_a_stop_string_ends_the_text_before_it(tokenizer: Tokenizer, stop: str) -> None:
    text = "a cat and then STOP or not"
    told, stream = pieces(tokenizer, text, "never", stop)
    assert stream.stopped
    assert "".join(told) == text[: text.index(stop)]


def test_the_first_of_several_stop_strings_counts(tokenizer: Tokenizer) -> None:
    assert "".join(pieces(tokenizer, "one two three", "three", "two")[0]) == "one "


def test_what_only_begins_like_a_stop_string_is_told_in_the_end(tokenizer: Tokenizer) -> None:
    told, stream = pieces(tokenizer, "a cat and STO", "STOP")
    assert "".join(told) == "a cat and STO"
    assert not stream.stopped
    assert "STO" not in "".join(told[:-1])


@given(st.text("ab<", max_size=12), st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3))
def test_held_back_is_the_longest_beginning_of_a_mark(text: str, marks: list[str]) -> None:
    fits = [n for n in range(len(text) + 1) if any(len(m) > n and m.startswith(text[len(text) - n :]) for m in marks)]
    assert held_back(text, marks) == max(fits, default=0)
