"""Tells a language model's thinking from its answer while it arrives. Pure: text in, text out.

However the text is split, the same parts come out. `<think>` blocks may be several, empty or not closed; special tokens
that are spelled out, as `<|im_end|>`, are left out of both parts. Within the strings of a JSON answer nothing is a tag.
"""

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
_SPECIAL = re.compile(r"<\|\w{1,32}\|>")
_SPECIAL_BEGUN = re.compile(r"<(\|(\w{1,32}\|?)?)?")
_MARK_BEGUN = re.compile(r"<(\|(\w{1,32}\|?)?|/?(t(h(i(nk?)?)?)?)?)?$")


class Part(StrEnum):
    """What a piece of text belongs to."""

    THINKING = "thinking"
    TEXT = "text"


class Piece(NamedTuple):
    """Some text of one part."""

    part: Part
    text: str


class Answer(NamedTuple):
    """Both parts of an answer, without white space around them."""

    thinking: str
    text: str


class ThinkParser:
    """Takes an answer piece by piece. What it tells of a part, put together, is that part of `answer`.

    There is one exception: a `</think>` that nothing opened, as some chat templates begin the block themselves, makes
    thinking of the text before it, which has been told as text by then. `answer` has it in its place.
    """

    def __init__(self) -> None:
        self._rest = ""
        self._part = Part.TEXT
        self._parts = {part: _Told() for part in Part}
        self._json = _JsonString()
        self._tagged = False

    @property
    def answer(self) -> Answer:
        """What has come so far; whole after `end`."""
        return Answer(self._parts[Part.THINKING].whole, self._parts[Part.TEXT].whole)

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain with this text."""
        self._rest += text.replace("\0", "")  # which no prompt may hold
        return [piece for piece in self._scan(final=False) if piece.text]

    def feed_thinking(self, text: str) -> list[Piece]:
        """Takes what the other side has told as thinking already."""
        return [piece for piece in [self._tell(Part.THINKING, text.replace("\0", ""))] if piece.text]

    def end(self) -> list[Piece]:
        """The pieces that were held back, as they might have become a tag."""
        return [piece for piece in self._scan(final=True) if piece.text]

    def _scan(self, *, final: bool) -> Iterator[Piece]:
        while self._rest:
            length = self._rest.find("<") if "<" in self._rest else len(self._rest)
            if not length:
                mark = self._mark()
                if mark:
                    self._rest = self._rest[len(mark) :]
                    self._obey(mark)
                    continue
                if not final and self._may_become_a_mark():
                    return
                length = 1
            text, self._rest = self._rest[:length], self._rest[length:]
            yield self._tell(self._part, text)

    def _tell(self, part: Part, text: str) -> Piece:
        if part is Part.TEXT:
            self._json.follow(text)
        return Piece(part, self._parts[part].add(text))

    def _mark(self) -> str:
        """The tag or special token that the rest begins with, "" for none."""
        special = _SPECIAL.match(self._rest)
        if special:
            return special[0]
        tags = () if self._in_json_string else (OPEN, CLOSE)
        return next((tag for tag in tags if self._rest.startswith(tag)), "")

    def _may_become_a_mark(self) -> bool:
        if _SPECIAL_BEGUN.fullmatch(self._rest):
            return True
        return not self._in_json_string and any(tag.startswith(self._rest) for tag in (OPEN, CLOSE))

    @property
    def _in_json_string(self) -> bool:
        return self._part is Part.TEXT and self._json.inside

    def _obey(self, mark: str) -> None:
        if mark == OPEN and self._part is Part.TEXT:
            self._parts[Part.THINKING].begin_block()
            self._part = Part.THINKING
        elif mark == CLOSE and self._part is Part.THINKING:
            self._part = Part.TEXT
        elif mark == CLOSE and not self._tagged:
            self._parts = {Part.THINKING: self._parts[Part.TEXT], Part.TEXT: _Told()}
            self._json = _JsonString()
        self._tagged = self._tagged or mark in (OPEN, CLOSE)
        self._parts[self._part].mark_removed()


class _Told:
    """One part as it was told: white space at its ends is not, and blocks are joined by a line break."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._space = ""
        self._begins = True

    @property
    def whole(self) -> str:
        return "".join(self._pieces)

    def begin_block(self) -> None:
        self._begins = True

    def add(self, text: str) -> str:
        """What can be told now."""
        if self._begins:
            text = text.lstrip()
            if not text:
                return ""
            self._space = "\n" if self._pieces else ""
            self._begins = False
        text = self._space + text
        told = text.rstrip()
        self._space = text[len(told) :]
        if told:
            self._pieces.append(told)
        return told

    def mark_removed(self) -> None:
        """What stood on both sides of a mark must not make a mark together."""
        if self._pieces and not self._space and _MARK_BEGUN.search("".join(self._pieces[-40:])[-40:]):
            self._space = " "


class _JsonString:
    """Follows a text and knows whether it stands within a string of a JSON object."""

    def __init__(self) -> None:
        self._is_json: bool | None = None
        self._escaped = False
        self.inside = False

    def follow(self, text: str) -> None:
        if self._is_json is None and text.strip():
            self._is_json = text.lstrip().startswith("{")
        if not self._is_json:
            return
        for char in text:
            if not self.inside:
                self.inside = char == '"'
            elif self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self.inside = False
