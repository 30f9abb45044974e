"""`ThinkParser`: however an answer is split, the same thinking and the same text come out."""

import json
import re
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.language.thinking import Answer, Part, ThinkParser

TAG = re.compile(r"</?think>|<\|\w{1,32}\|>")


def parse(pieces: Sequence[str]) -> tuple[Answer, Answer]:
    """The answer, and what was told piece by piece."""
    parser = ThinkParser()
    told = [told for piece in pieces for told in parser.feed(piece)] + parser.end()
    assert all(piece.text for piece in told)
    joined = {part: "".join(piece.text for piece in told if piece.part is part) for part in Part}
    return parser.answer, Answer(joined[Part.THINKING], joined[Part.TEXT])


FRAGMENTS = st.sampled_from(
    ["<think>", "</think>", "<", ">", "/", "think", "<th", "ink>", "</", "<|im_end|>", "<|im_", "end|>", "<|", "|>"]
) | st.sampled_from([" ", "\n", "a", "cat", "{", "}", '"', "\\", "两", "🐈", "<|endoftext|>", "\0"])
TEXTS = st.one_of(
    st.lists(FRAGMENTS, max_size=16).map("".join), st.text(st.sampled_from('<>/think |a{"\\\n'), max_size=40)
)


def split(text: str, places: Sequence[int]) -> list[str]:
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(ends)]


@given(text=TEXTS, places=st.lists(st.integers(0, 80), max_size=20))
@example(text="<think>a</think>b", places=list(range(20)))
@example(text="<|im_<|im_end|>start|><th<think></think>ink>", places=list(range(60)))
@example(text='{"a": "<think>\\"</think>"}<think>b</think>', places=list(range(60)))
def test_any_split_gives_the_same(text: str, places: list[int]) -> None:
    whole, told = parse([text])
    pieces = split(text, places)
    assert "".join(pieces) == text
    assert parse(pieces) == (whole, told)
    assert parse(list(text)) == (whole, told)


@given(text=TEXTS)
def test_no_mark_is_left(text: str) -> None:
    """Except tags within the strings of JSON, which belong to the answer."""
    answer, _ = parse([text])
    for part in answer:
        assert not re.search(r"<\|\w{1,32}\|>", part)
        assert "\0" not in part
    assert [part.strip() for part in answer] == list(answer)
    assert not TAG.search(answer.thinking) or "{" in text
    assert not TAG.search(answer.text) or "{" in text


@given(text=TEXTS)
def test_what_is_told_is_the_answer_unless_a_block_was_never_opened(text: str) -> None:
    answer, told = parse([text])
    close, opened = text.find("</think>"), text.find("<think>")
    if close < 0 or 0 <= opened < close:
        assert told == answer


PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<\0"), max_size=20)


@given(text=PLAIN)
def test_text_without_marks_is_the_answer(text: str) -> None:
    assert parse([text])[0] == Answer("", text.strip())


@given(blocks=st.lists(st.tuples(PLAIN, PLAIN), max_size=5), last=st.one_of(st.none(), PLAIN))
def test_blocks_are_taken_out(blocks: list[tuple[str, str]], last: str | None) -> None:
    """Any number of blocks, before, between and after text, the last one perhaps not closed."""
    first = "A:"  # so that no text begins as JSON does
    answer = first + "".join(f"<think>{thinking}</think>{text}" for thinking, text in blocks)
    thoughts = [thinking for thinking, _ in blocks]
    if last is not None:
        answer, thoughts = f"{answer}<think>{last}", [*thoughts, last]
    got, told = parse([answer])
    assert got.text == (first + "".join(text for _, text in blocks)).strip()
    assert got.thinking == "\n".join(thinking.strip() for thinking in thoughts if thinking.strip())
    assert told == got


CASES = {
    "Qwen3": ("<think>\nWarm light.\n</think>\n\nA cat in warm light.", "Warm light.", "A cat in warm light."),
    "empty": ("<think>\n\n</think>\n\nA cat.", "", "A cat."),
    "not closed": ("<think>\nLet me think about", "Let me think about", ""),
    "nothing but tags": ("<think></think>", "", ""),
    "opened within": ("<think>a<think>b</think>c", "ab", "c"),
    "closed twice": ("<think>a</think>b</think>c", "a", "bc"),
    "never opened": ("Let me think.\n</think>\n\nA cat.", "Let me think.", "A cat."),
    "never opened, then opened": ("a</think>b<think>c</think>d", "a\nc", "bd"),
    "half a tag at the end": ("A cat <thi", "", "A cat <thi"),
    "half a tag in the middle": ("A <thin cat", "", "A <thin cat"),
    "another tag": ("A <thinker> cat", "", "A <thinker> cat"),
    "special tokens": ("<|im_start|>A cat<|im_end|>\n<|endoftext|>", "", "A cat"),
    "a special token in thinking": ("<think>a<|im_end|>b</think>c", "ab", "c"),
    "a special token made of two": ("<|im_<|im_end|>start|>", "", "<|im_ start|>"),
    "a tag made by a block": ("<th<think>a</think>ink>b", "a", "<th ink>b"),
    "no special token": ("a <| b |> c <||> <|a b|>", "", "a <| b |> c <||> <|a b|>"),
    "NUL": ("A\0 cat", "", "A cat"),
}


@pytest.mark.parametrize(("text", "thinking", "rest"), CASES.values(), ids=CASES.keys())
def test_cases(text: str, thinking: str, rest: str) -> None:
    assert parse([text])[0] == Answer(thinking, rest)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('<>/think|"\\ a{}'), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("a<>", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text("ab", max_size=3), json_values, max_size=4), indent=st.sampled_from([None, 2]))
def test_json_comes_through_untouched(value: dict[str, object], indent: int | None) -> None:
    """Also where its strings hold what would be a tag elsewhere, and behind a block of thinking."""
    text = json.dumps(value, indent=indent)
    if re.search(r"<\|\w{1,32}\|>", text):
        return
    assert parse([text])[0] == Answer("", text)
    assert parse([f"<think>a {{</think>\n\n{text}\n"])[0] == Answer("a {", text)
    assert parse([*f"{text}\n<think>b</think>"])[0] == Answer("b", text)


def test_thinking_that_the_other_side_tells_apart() -> None:
    parser = ThinkParser()
    told = [*parser.feed_thinking("\nWarm "), *parser.feed_thinking("light.\n"), *parser.feed("\n\nA cat.")]
    told += parser.end()
    assert parser.answer == Answer("Warm light.", "A cat.")
    assert [(piece.part, piece.text) for piece in told] == [
        (Part.THINKING, "Warm"),
        (Part.THINKING, " light."),
        (Part.TEXT, "A cat."),
    ]


def test_pieces_come_as_soon_as_they_are_certain() -> None:
    parser = ThinkParser()
    assert [piece.text for piece in parser.feed("A cat <t")] == ["A cat"]
    assert parser.feed("hin") == []
    assert [piece.text for piece in parser.feed("g on")] == [" <", "thing on"]
    assert parser.end() == []
