"""The flags of `zimage serve`, made of the services' settings: what a setting is called, says and defaults to stands
there, once. Also tells what is in force and where each value comes from."""

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import AnyHttpUrl
from pydantic.fields import FieldInfo

from services.diffusion.settings import DiffusionSettings
from services.encoder.settings import EncoderSettings
from services.gateway.settings import GatewaySettings
from services.rewriter.settings import RewriterSettings
from services.vl.settings import VlSettings
from shared.profiles import flatten, read_profile
from shared.settings import (
    CONFIG_FILE,
    DEFAULT_PROFILE,
    PROFILE,
    InvalidSettings,
    ServiceSettings,
    key_of,
    panel_of,
    read_settings,
    source_of,
    variable_of,
)

SERVICES: Mapping[str, type[ServiceSettings]] = {
    "encoder": EncoderSettings,
    "diffusion": DiffusionSettings,
    "gateway": GatewaySettings,
    "rewriter": RewriterSettings,
    "vl": VlSettings,
}


@dataclass(frozen=True, slots=True)
class InForce:
    """A setting's value, and "default" or the variable or key that it comes from."""

    name: str
    value: Any
    source: str


def all_fields() -> dict[str, FieldInfo]:
    """Every setting of every service by its name; a name that two services share is the same setting."""
    return {name: field for kind in SERVICES.values() for name, field in kind.model_fields.items()}


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command, whose last parameter is `**flags`, an option for every setting that has a panel.

    An option that is not given is None: then the environment, the file or the default decides.
    """
    signature = inspect.signature(command)
    own = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own, *(_option(name, field) for name, field in all_fields().items() if panel_of(field))]
    )
    return command


def set_environment(flags: Mapping[str, Any]) -> None:
    """Puts the flags that were given into this process's environment, which the services inherit."""
    for name, value in flags.items():
        if isinstance(value, list):  # of a flag that may be repeated; a comma may stand in its values
            os.environ[variable_of(name)] = json.dumps(value)
        elif value is not None:
            os.environ[variable_of(name)] = str(value.resolve()) if isinstance(value, Path) else str(value)


def check_configuration(services: Sequence[str] = tuple(SERVICES)) -> dict[str, ServiceSettings]:
    """The settings of each service, read as it will read them. Raises InvalidSettings.

    Unlike a service, which knows only its own part, this also refuses keys that no service has.
    """
    path = os.environ.get(CONFIG_FILE)
    if path:
        profile = os.environ.get(PROFILE, DEFAULT_PROFILE)
        known = {key_of(field) for field in all_fields().values()}
        for key, value in flatten(read_profile(Path(path), profile)).items():
            if key not in known:
                raise InvalidSettings(f"{key} = {value!r} in [{profile}] of {path}: there is no such setting")
    return {name: read_settings(SERVICES[name]) for name in services}


def in_force() -> list[InForce]:
    """Every setting, its value and where it comes from. Raises InvalidSettings."""
    rows: dict[str, InForce] = {}
    for settings in check_configuration().values():
        for name in type(settings).model_fields:
            source = source_of(type(settings), name) if name in settings.model_fields_set else "default"
            rows[name] = InForce(name, getattr(settings, name), source)
    return list(rows.values())


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    kind = _flag_type(field)
    if kind is bool:  # so that the command line can also say no to what the environment or the file says
        flag += f"/--no-{flag.removeprefix('--')}"
    default = field.default.value if isinstance(field.default, Enum) else field.default
    shown = "" if default in (None, False, ()) else f" Default: {default}."
    option = typer.Option(flag, help=f"{field.description}{shown}", rich_help_panel=panel_of(field))
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _flag_type(field: FieldInfo) -> Any:
    kind = field.annotation
    if get_origin(kind) is tuple:  # a flag that may be repeated
        return list[str]
    if isinstance(kind, UnionType) or get_origin(kind) is not None:
        kind = next(item for item in get_args(kind) if item is not type(None))
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return str if kind is AnyHttpUrl else kind
