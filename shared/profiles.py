"""The configuration file: TOML, of which each table at the top is a profile. Knows no setting."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class InvalidSettings(Exception):
    """The settings cannot be used; the text names the setting, its value and where it came from."""


def read_profile(path: Path, profile: str) -> dict[str, Any]:
    """A profile's table of a TOML file. Raises InvalidSettings for a file or a profile that is not there."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSettings(f"the configuration file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"the configuration file {path} is not TOML: {error}") from None
    table = tables.get(profile)
    if not isinstance(table, dict):
        there = ", ".join(name for name, value in tables.items() if isinstance(value, dict)) or "none"
        raise InvalidSettings(f"the configuration file {path} has no profile '{profile}'; it has: {there}")
    return table


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
