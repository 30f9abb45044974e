"""Write the table of flags in README.md from `zimage serve` itself: `.venv/bin/python scripts/readme_flags.py`.

It replaces what stands between `<!-- flags -->` and `<!-- /flags -->`. What this doesn't know: settings that are no
flags, which config.example.toml lists.
"""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Any

import typer.main
from pydantic.fields import FieldInfo

from shared.settings import key_of
from zimage.cli import app
from zimage.flags import all_fields

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- flags -->\n).*?(<!-- /flags -->)", re.DOTALL)
HEAD = ("| Flag | Key in config.toml | Default | Meaning |", "|---|---|---|---|")


def main() -> None:
    """Rewrite the block and say so."""
    TARGET.write_text(updated(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote the flags in {TARGET.name}")


def updated(readme: str) -> str:
    """The README with its block made anew."""
    if not BLOCK.search(readme):
        raise SystemExit(f"{TARGET.name} has no <!-- flags --> block")
    return BLOCK.sub(lambda found: f"{found[1]}{table()}\n{found[2]}", readme)


def table() -> str:
    """A Markdown table with a row for each flag of `zimage serve`, those of a panel together."""
    command: Any = typer.main.get_command(app)
    options = [option for option in command.commands["serve"].params if option.name != "help"]
    panels = list(dict.fromkeys(option.rich_help_panel or "" for option in options))
    options.sort(key=lambda option: (not option.rich_help_panel, panels.index(option.rich_help_panel or "")))
    return "\n".join([*HEAD, *(_row(option, all_fields().get(option.name)) for option in options)])


def _row(option: Any, field: FieldInfo | None) -> str:
    if field is None:
        shown = option.show_default
        return _line(option.opts[0], "", shown if isinstance(shown, str) else None, option.help)
    value = field.get_default(call_default_factory=True)
    return _line(option.opts[0], key_of(field), value, field.description or "")


def _line(flag: str, key: str, default: Any, text: str) -> str:
    cells = (f"`{flag}`", f"`{key}`" if key else "", _shown(default), text.removesuffix("."))
    return f"| {' | '.join(cells)} |"


def _shown(default: Any) -> str:
    match default:
        case None | False | ():
            return ""
        case True:
            return "`true`"
        case Enum():
            return f"`{default.value}`"
        case Path():
            return "the user's data folder"  # differs from machine to machine
        case _:
            return f"`{default}`"


if __name__ == "__main__":
    main()
