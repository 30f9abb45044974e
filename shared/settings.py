"""Settings that every service has. Each service adds its own in its `settings.py` and reads only those.

A value comes from `ZIMAGE_...` in the environment or is the default written here, once; the command line sets the
environment of the services that it starts.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.logs import LogFormat

DEFAULT_MAX_PIXELS = 4_200_000
"""Width times height of the largest picture: a little over 2048 x 2048."""


class Device(StrEnum):
    """Where a model runs; auto is the best that this machine has."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class Dtype(StrEnum):
    """Number format of a model's weights; auto is the checkpoint's own. (float16 gives black pictures.)"""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class InvalidSettings(Exception):
    """The settings cannot be used; the text names the setting, its value and where it came from."""


class ServiceSettings(BaseSettings):
    """What every service is told about its process."""

    model_config = SettingsConfigDict(
        env_prefix="ZIMAGE_", extra="ignore", frozen=True, populate_by_name=True, protected_namespaces=()
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(0, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    log_format: LogFormat = Field("auto", validation_alias="ZIMAGE_LOG_FORMAT", description="auto, console or json")
    debug: bool = Field(default=False, validation_alias="ZIMAGE_DEBUG", description="log more")
    shutdown_timeout_s: float = Field(
        30.0,
        ge=0,
        validation_alias="ZIMAGE_SHUTDOWN_TIMEOUT_S",
        description="how long running requests may take to finish at a stop",
    )


S = TypeVar("S", bound=ServiceSettings)


def read_settings(kind: type[S], **values: Any) -> S:
    """Reads a service's settings; `values` win over the environment. Raises InvalidSettings with one clear line."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if name in kind.model_fields:
            name = f"{kind.model_config['env_prefix']}{name}".upper()
        raise InvalidSettings(f"{name} = {_shown(first)!r}: {first['msg']}") from None


def _shown(error: Mapping[str, Any]) -> Any:
    return "(not set)" if error["type"] == "missing" else error["input"]
