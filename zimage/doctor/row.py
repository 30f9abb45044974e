"""One finding."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """What a finding means: MISSING keeps the configured server from starting, NOTE is worth knowing."""

    OK = "ok"
    NOTE = "note"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Row:
    """What was looked at, what was found, and what to do about it."""

    what: str
    state: State
    detail: str
    todo: str = ""


def ok(what: str, detail: str) -> Row:
    """It is as it should be."""
    return Row(what, State.OK, detail)


def note(what: str, detail: str, todo: str = "") -> Row:
    """The configured server does without it."""
    return Row(what, State.NOTE, detail, todo)


def missing(what: str, detail: str, todo: str) -> Row:
    """The configured server cannot start."""
    return Row(what, State.MISSING, detail, todo)


def lacking(what: str, detail: str, todo: str, *, needed: bool) -> Row:
    """Missing where the configuration asks for it, else a note."""
    return missing(what, detail, todo) if needed else note(what, detail, todo)
