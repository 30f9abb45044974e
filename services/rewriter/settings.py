"""What the rewriter is told."""

from enum import StrEnum
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

from pydantic import SecretStr, model_validator
from pydantic_core import PydanticCustomError

from shared.addresses import ServiceUrl, without_version
from shared.language.defaults import WritingSettings
from shared.secret import ApiKey
from shared.settings import Device, Dtype, ModelSettings, UpstreamSettings, setting


class BackEndKind(StrEnum):
    """Which language model writes."""

    AUTO = "auto"
    LOCAL = "local"
    ENCODER = "encoder"
    API = "api"


class Upstream(NamedTuple):
    """Servers that speak OpenAI's protocol, one or several alike; the URLs have no `/v1` at their end."""

    urls: tuple[str, ...]
    key: SecretStr | None


class RewriterSettings(ModelSettings, UpstreamSettings, WritingSettings):
    """Settings of the rewriter service."""

    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")

    rewriter_host: str = setting("127.0.0.1", key="rewriter.host", description="address that the rewriter listens on")
    rewriter_port: int = setting(7862, key="rewriter.port", ge=0, le=65535, description="its port; 0 picks a free one")
    rewriter_backend: BackEndKind = setting(
        BackEndKind.AUTO,
        key="rewriter.backend",
        description="what writes: local is a language model of its own, encoder shares the encoder's, api asks another "
        "server; auto is encoder where `zimage serve` runs one, else local",
    )
    rewriter_use_api: bool = setting(
        default=False,
        key="rewriter.use_api",
        panel="Rewriter",
        description="Use an API backend for prompt rewriting.",
    )
    rewriter_api_url: ServiceUrl | None = setting(
        None, key="rewriter.api_url", panel="Rewriter", description="API URL for the rewriter (default: --api-url)."
    )
    rewriter_api_model: str = setting(
        "Qwen3-4B", key="rewriter.api_model", panel="Rewriter", description="Model ID for the rewriter API."
    )
    rewriter_api_key: ApiKey = setting(None, key="", description="key of the rewriter API, sent as a bearer token")
    rewriter_api_timeout_s: float = setting(
        300.0, key="rewriter.api_timeout_s", gt=0, description="deadline of an answer of the rewriter API, in seconds"
    )
    rewriter_model_path: Path | None = setting(
        None,
        key="rewriter.model_path",
        description="folder of another Qwen3 language model, as published; without it the text encoder's weights serve",
    )
    rewriter_device: Device = setting(
        Device.AUTO, key="devices.rewriter", description="device for a language model of its own (cpu/cuda/mps/auto)"
    )
    rewriter_dtype: Dtype = setting(
        Dtype.AUTO,
        key="rewriter.dtype",
        description="number format of its weights; auto is bfloat16 on a GPU, else the checkpoint's own",
    )
    rewriter_max_writing: int = setting(
        8, key="rewriter.max_writing", ge=1, description="prompts that are written together"
    )
    rewriter_max_waiting: int = setting(
        64, key="rewriter.max_waiting", ge=1, description="prompts that may wait; beyond it a request is refused"
    )
    rewriter_max_cache_tokens: int = setting(
        40_960,
        key="rewriter.max_cache_tokens",
        ge=256,
        description="tokens that the prompts being written may hold together, padding included",
    )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return self.rewriter_host, self.rewriter_port

    @property
    def back_end(self) -> BackEndKind:
        """What writes; `auto` is local, as whoever starts this service beside an encoder says so."""
        if self.rewriter_use_api:
            return BackEndKind.API
        return BackEndKind.LOCAL if self.rewriter_backend is BackEndKind.AUTO else self.rewriter_backend

    @property
    def reads_model_directory(self) -> bool:
        """Whether it loads its `parts` of the model directory."""
        return self.back_end is BackEndKind.LOCAL and self.rewriter_model_path is None

    @property
    def upstream(self) -> Upstream:
        """The servers behind the back ends `encoder` and `api`.

        The key of --api-url goes to no other server, nor does the services' token. Raises InvalidSettings.
        """
        if self.back_end is BackEndKind.ENCODER:
            return Upstream(tuple(map(without_version, self.encoders)), SecretStr(self.token) if self.token else None)
        key = self.rewriter_api_key or (self.api_key if self.rewriter_api_url is None else None)
        return Upstream((without_version(str(self.rewriter_api_url or self.api_url)),), key)

    @model_validator(mode="after")
    def _an_api_has_a_url(self) -> Self:
        if self.back_end is BackEndKind.API and self.rewriter_api_url is None and self.api_url is None:
            raise PydanticCustomError(
                "zimage_rewriter_api_url",
                "--rewriter-use-api needs the URL of a server: give --rewriter-api-url or --api-url too",
            )
        return self
