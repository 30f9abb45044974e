"""Settings: where they come from, and those that every service has. Each service adds its own and reads only those.

A setting is written once, as a field: its name makes the environment variable (`ZIMAGE_` and the name in capitals) and
the flag of the command line, `key` its place in the configuration file, and the default stands beside it. Flags win
over the environment, that over the file, that over the default; the command line passes flags on as environment. An
empty variable is none.
"""

import os
from abc import abstractmethod
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from platformdirs import user_data_path
from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from shared.addresses import ServiceUrl, ServiceUrls, is_loopback, without_passwords
from shared.logs import LogFormat
from shared.profiles import InvalidSettings as InvalidSettings
from shared.profiles import flatten, read_profile
from shared.secret import ApiKey, BadToken, checked_token, read_token

ENV_PREFIX = "ZIMAGE_"
CONFIG_FILE, PROFILE = "ZIMAGE_CONFIG", "ZIMAGE_PROFILE"
DEFAULT_PROFILE = "default"
_CHECKPOINTS = Path(__file__).resolve().parent.parent / "demo_model" / "checkpoints"
BUNDLED_MODEL, BUNDLED_VISION_MODEL = _CHECKPOINTS / "z-image", _CHECKPOINTS / "qwen3-vl"
"""The demo model, which is used where no model is named: a Z-Image directory and a Qwen3-VL one."""
DEFAULT_MAX_PIXELS = 4_200_000
"""Width times height of the largest picture: a little over 2048 x 2048."""


_Token = Annotated[SecretStr | None, BeforeValidator(lambda value: value or None)]
_TokenFile = Annotated[Path | None, BeforeValidator(lambda value: value or None)]


class Device(StrEnum):
    """Where a model runs; auto is the best that this machine has."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class Dtype(StrEnum):
    """Number format of a model's weights; auto is bfloat16 on a GPU, else the checkpoint's own. (float16 gives black
    pictures.)"""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Quantization(StrEnum):
    """Number format that torchao keeps weights in; with `dynamic` what they are multiplied with is converted too."""

    NONE = "none"
    INT8 = "int8"
    INT8_DYNAMIC = "int8_dynamic"
    FP8 = "fp8"
    FP8_DYNAMIC = "fp8_dynamic"


def setting(default: Any, *, key: str, panel: str = "", description: str, **constraints: Any) -> Any:
    """A field of a settings class. `key` is its dotted place in a profile of the configuration file; a `panel` makes it
    a flag of `zimage serve`, shown under that title; `constraints` are pydantic's."""
    return Field(default, description=description, json_schema_extra={"key": key, "panel": panel}, **constraints)


def key_of(field: FieldInfo) -> str:
    """The field's dotted place in a profile of the configuration file, "" for none."""
    extra = field.json_schema_extra
    return str(extra["key"]) if isinstance(extra, dict) else ""


def panel_of(field: FieldInfo) -> str:
    """The title under which the command line shows the field's flag, "" for a field that is no flag."""
    extra = field.json_schema_extra
    return str(extra["panel"]) if isinstance(extra, dict) else ""


class ServiceSettings(BaseSettings):
    """What every service is told about its process."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,  # as compose files set a variable that its user left out
        extra="ignore",
        frozen=True,
        protected_namespaces=(),
        nested_model_default_partial_update=True,
    )

    log_format: LogFormat = setting("auto", key="server.log_format", description="auto, console or json")
    debug: bool = setting(default=False, key="server.debug", panel="Optimization", description="Enable debug logging.")
    shutdown_timeout_s: float = setting(
        30.0, key="server.shutdown_timeout_s", ge=0, description="seconds that running requests may take at a stop"
    )

    @property
    @abstractmethod
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - not a source of ours
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - not a source of ours
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment, then the configuration file."""
        return init_settings, env_settings, _ProfileSource(settings_cls)


class CheckpointSettings(ServiceSettings):
    """Which Z-Image directory is used."""

    model_path: Path | None = setting(
        None,
        key="model_path",
        panel="Model & device",
        description="Path to the Z-Image model; the bundled demo model without one.",
    )

    @property
    def model_folder(self) -> Path:
        """The Z-Image directory: the one that is given, else the bundled demo model."""
        return self.model_path or BUNDLED_MODEL


class TokenSettings(ServiceSettings):
    """The secret that services on several machines share."""

    service_token: _Token = setting(
        None, key="", description="secret that services ask of one another's requests, sent as a bearer token"
    )
    service_token_file: _TokenFile = setting(
        None,
        key="server.service_token_file",
        panel="Nodes",
        description="File that holds the token which services ask of one another.",
    )

    @property
    def token(self) -> str | None:
        """The secret; that of the environment wins over the file's. Raises InvalidSettings."""
        try:
            if self.service_token is not None:
                return checked_token(self.service_token.get_secret_value(), variable_of("service_token"))
            return None if self.service_token_file is None else read_token(self.service_token_file)
        except BadToken as error:
            raise InvalidSettings(str(error)) from None

    @property
    def authorization(self) -> dict[str, str]:
        """The header that shows the secret to another service, none without one. Raises InvalidSettings."""
        return {"authorization": f"Bearer {self.token}"} if self.token else {}


class NodeSettings(TokenSettings):
    """Settings of a service that serves others, not users."""

    allow_no_token: bool = setting(
        default=False,
        key="server.allow_no_token",
        description="let a service listen beyond its own machine without asking a token of its callers",
    )

    def require_token(self) -> None:
        """Raises InvalidSettings where other machines could use the service and no token keeps strangers out."""
        host = self.address[0]
        if self.token is None and not self.allow_no_token and not is_loopback(host):
            raise InvalidSettings(
                f"whoever reaches {host} could use this service: set {variable_of('service_token')} or "
                f"{variable_of('service_token_file')} here and at the gateway, or, on a network that you trust, "
                f"{variable_of('allow_no_token')}=true"
            )


class ModelSettings(NodeSettings, CheckpointSettings):
    """Settings of a service that loads parts of the Z-Image directory; `parts` are those folders."""

    parts: ClassVar[tuple[str, ...]]


class DataSettings(ServiceSettings):
    """Settings of a service that keeps files of its own."""

    data_dir: Path = setting(
        user_data_path("zimage", appauthor=False),
        key="data_dir",
        panel="Server",
        description="Folder for everything that is written: history, logs, pictures, embeddings.",
    )


class UpstreamSettings(TokenSettings):
    """Settings of a service that asks the encoder, or an API back end in its place."""

    api_url: ServiceUrl | None = setting(
        None, key="api.url", panel="API backend", description="URL of an API backend that serves /v1/hidden_states."
    )
    api_key: ApiKey = setting(None, key="", description="key of the API backend, sent as a bearer token")
    encoder_urls: ServiceUrls = setting(
        (),
        key="encoder.urls",
        panel="Nodes",
        description="Base URLs of encoders, with commas between them; they take the place of one on this machine.",
    )

    @property
    def encoders(self) -> tuple[str, ...]:
        """The encoders' base URLs; where none are given, that of one on this machine."""
        return tuple(map(str, self.encoder_urls)) or ("http://127.0.0.1:7861",)


class VisionSettings(CheckpointSettings):
    """What the vl service does and the gateway tells of it."""

    vl_model_path: Path | None = setting(
        None,
        key="vl.model_path",
        panel="Vision",
        description="Path to the Qwen3-VL model; enables vision conditioning.",
    )
    vl_device: Device = setting(
        Device.CPU, key="vl.device", panel="Vision", description="Device for Qwen3-VL (cpu/cuda/mps/auto)."
    )
    vl_auto_unload: bool = setting(
        default=True, key="vl.auto_unload", panel="Vision", description="Unload the model after an extraction."
    )

    @property
    def vl_model_folder(self) -> Path | None:
        """The Qwen3-VL directory: the one that is given, beside the bundled demo model its own, else None."""
        bundled = self.model_path is None and BUNDLED_VISION_MODEL.is_dir()
        return self.vl_model_path or (BUNDLED_VISION_MODEL if bundled else None)


class _ProfileSource(PydanticBaseSettingsSource):
    """The profile of the configuration file that the environment names."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self().get(field_name), key_of(field), False

    def __call__(self) -> dict[str, Any]:
        path = os.environ.get(CONFIG_FILE)
        profile = read_profile(Path(path), os.environ.get(PROFILE, DEFAULT_PROFILE)) if path else {}
        flat = flatten(profile)
        fields = self.settings_cls.model_fields
        return {name: flat[key_of(field)] for name, field in fields.items() if key_of(field) in flat}


S = TypeVar("S", bound=ServiceSettings)


def read_settings(kind: type[S]) -> S:
    """Reads a service's settings. Raises InvalidSettings with one line that names setting, value and source."""
    try:
        return kind()
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # a rule about several settings, whose text names them
            raise InvalidSettings(first["msg"]) from None
        where = source_of(kind, str(first["loc"][0]))
        secret = _is_secret(kind.model_fields[str(first["loc"][0])])
        value = "(hidden)" if secret else without_passwords(repr(first["input"]))
        raise InvalidSettings(f"{where} = {value}: {first['msg']}") from None


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr in (field.annotation, *get_args(field.annotation))


def source_of(kind: type[ServiceSettings], name: str) -> str:
    """Where a field's value comes from: the variable (with the flag that may have set it), or the key and the file."""
    variable, field = variable_of(name), kind.model_fields[name]
    if os.environ.get(variable):
        return f"--{name.replace('_', '-')} ({variable})" if panel_of(field) else variable
    return f"{key_of(field)} in [{os.environ.get(PROFILE, DEFAULT_PROFILE)}] of {os.environ.get(CONFIG_FILE)}"


def variable_of(name: str) -> str:
    """The environment variable of a field."""
    return f"{ENV_PREFIX}{name.upper()}"
