"""Write config.example.toml from the services' settings: `.venv/bin/python scripts/config_example.py`.

Every setting that has a key is listed under its table with its description, its flag and variable, and its default.
Commented out are settings without a default or with one that differs from machine to machine. What
this doesn't know: what any setting does; that stands beside the setting itself.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from shared.settings import key_of, panel_of, variable_of
from zimage.flags import all_fields

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "config.example.toml"
PROFILE = "default"
WIDTH = 100
HEAD = """\
# Every key that a configuration file may hold, with its default. Made by scripts/config_example.py: change the settings
# in services/*/settings.py, not this file.
#
# Copy it, keep the lines that you change, and start with `zimage serve --config FILE`. A table at the top level is a
# profile; `--profile NAME` chooses another than [default]. A flag wins over its ZIMAGE_ variable, that over this file.
# `zimage config --config FILE` shows what is in force and where each value comes from. Not keys, so that no file holds
# them, are the secrets ZIMAGE_API_KEY and ZIMAGE_REWRITER_API_KEY, the bearer tokens for the servers behind --api-url
# and --rewriter-api-url, and ZIMAGE_SERVICE_TOKEN, which the services ask of one another.
"""


def main() -> None:
    """Write the file and say so."""
    TARGET.write_text(render(), encoding="utf-8")
    print(f"wrote {TARGET.name}")


def render() -> str:
    """The whole file."""
    tables: dict[str, list[str]] = {"": []}
    for name, field in all_fields().items():
        if key := key_of(field):
            table, _, last = key.rpartition(".")
            tables.setdefault(table, []).append(_entry(name, last, field))
    sections = [_section(table, entries) for table, entries in tables.items()]
    return "\n".join([HEAD, *sections])


def _section(table: str, entries: Sequence[str]) -> str:
    return "\n".join([f"[{PROFILE}.{table}]" if table else f"[{PROFILE}]", *entries])


def _entry(name: str, key: str, field: FieldInfo) -> str:
    flag = f"--{name.replace('_', '-')}, " if panel_of(field) else ""
    text = f"{_sentence(field.description or '')}{_choices(field)}"
    comment = [*textwrap.wrap(text, WIDTH), f"{flag}{variable_of(name)}"]
    default = field.get_default(call_default_factory=True)
    silent = default is None or isinstance(default, Path)
    return "\n".join([*(f"# {line}" for line in comment), f"{'# ' * silent}{key} = {_example(field, default)}", ""])


def _sentence(text: str) -> str:
    """The text with a capital at its start and a full stop at its end."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '.)')) else '.'}"


def _choices(field: FieldInfo) -> str:
    kind = field.annotation
    values = [item.value for item in kind] if isinstance(kind, type) and issubclass(kind, Enum) else get_args(kind)
    names = [value for value in values if isinstance(value, str)]
    return "" if all(name in (field.description or "") for name in names) else f" One of: {', '.join(names)}."


def _example(field: FieldInfo, default: Any) -> str:
    if default is not None:
        return _toml(default)
    return "..." if {int, float} & {*get_args(field.annotation)} else '"..."'


def _toml(value: Any) -> str:
    match value:
        case Enum():
            return _toml(value.value)
        case Path():
            return json.dumps(str(value.relative_to(ROOT)) if value.is_relative_to(ROOT) else "...")
        case bool() | int() | float():
            return str(value).lower()
        case list() | tuple():
            return f"[{', '.join(_toml(item) for item in value)}]"
        case _:
            return json.dumps(str(value), ensure_ascii=False)


if __name__ == "__main__":
    main()
