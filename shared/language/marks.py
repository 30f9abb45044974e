"""Marks in a text that arrives in pieces: what may still become one has to wait for the next piece."""

from collections.abc import Sequence


def held_back(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may become a mark; one that is whole is for the caller to find."""
    longest = max((len(mark) for mark in marks), default=0) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(len(mark) > length and mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
