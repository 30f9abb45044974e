"""What the gateway is told: its address, where the services are, and the defaults of a request's fields."""

from pathlib import Path
from typing import Annotated, Self

from platformdirs import user_data_path
from pydantic import AnyHttpUrl, SecretStr, UrlConstraints, model_validator
from pydantic_core import PydanticCustomError

from shared.schemas.fields import GuidanceScale, HiddenLayer, LongPromptMode, Shift, Side, Steps
from shared.settings import DEFAULT_MAX_PIXELS, ServiceSettings, setting
from shared.templates import DEFAULT_DIR

ServiceUrl = Annotated[AnyHttpUrl, UrlConstraints(allowed_schemes=["http", "https"])]


class GatewaySettings(ServiceSettings):
    """Settings of the gateway."""

    host: str = setting("127.0.0.1", key="server.host", panel="Server", description="Server host.")
    port: int = setting(7860, key="server.port", panel="Server", ge=0, le=65535, description="Server port.")
    encoder_only: bool = setting(
        default=False, key="server.encoder_only", panel="Server", description="Load only the encoder (no DiT/VAE)."
    )
    use_api_encoder: bool = setting(
        default=False,
        key="api.use_encoder",
        panel="Server",
        description="Use the API backend for encoding (local is default).",
    )
    api_url: ServiceUrl | None = setting(
        None, key="api.url", panel="API backend", description="URL of an API backend that serves /v1/hidden_states."
    )
    api_model: str | None = setting(
        None, key="api.model", panel="API backend", description="Model ID for the API backend."
    )
    api_key: SecretStr | None = setting(None, key="", description="key of the API backend, sent as a bearer token")
    encoder_url: ServiceUrl = setting(
        AnyHttpUrl("http://127.0.0.1:7861"), key="encoder.url", description="base URL of the encoder"
    )
    diffusion_url: ServiceUrl = setting(
        AnyHttpUrl("http://127.0.0.1:7864"), key="diffusion.url", description="base URL of the diffusion service"
    )
    redis_url: str | None = setting(
        None,
        key="redis.url",
        panel="Server",
        description="Redis that keeps the history; without one the server runs its own in the data directory.",
    )
    history_max_entries: int = setting(
        1000, key="history.max_entries", ge=1, description="pictures that the history keeps; the oldest goes first"
    )
    history_max_bytes: int = setting(
        1 << 30, key="history.max_bytes", ge=1 << 20, description="bytes that the history keeps, pictures included"
    )
    data_dir: Path = setting(
        user_data_path("zimage", appauthor=False),
        key="data_dir",
        panel="Server",
        description="Folder for everything that is written: history, logs, pictures, embeddings.",
    )
    templates_dir: Path = setting(DEFAULT_DIR, key="templates_dir", description="folder of the templates")
    hidden_layer: HiddenLayer = setting(
        -2,
        key="generation.hidden_layer",
        panel="Model & device",
        description="Which hidden layer to extract embeddings from (-1=last, -2=penultimate).",
    )
    width: Side = setting(1024, key="generation.width", description="width of a picture that names none, in pixels")
    height: Side = setting(1024, key="generation.height", description="height of a picture that names none, in pixels")
    steps: Steps = setting(9, key="generation.steps", description="denoising steps of a picture that names none")
    shift: Shift = setting(3.0, key="scheduler.shift", panel="Generation", description="Scheduler shift/mu parameter.")
    guidance_scale: GuidanceScale = setting(
        0.0, key="generation.guidance_scale", panel="Generation", description="CFG scale (0.0 for Z-Image Turbo)."
    )
    long_prompt_mode: LongPromptMode = setting(
        LongPromptMode.INTERPOLATE,
        key="generation.long_prompt_mode",
        panel="Generation",
        description="How to handle prompts beyond the text limit (1504 tokens for the published model).",
    )
    max_pixels: int = setting(
        DEFAULT_MAX_PIXELS, key="generation.max_pixels", ge=256, description="largest width x height of a picture"
    )
    encode_timeout_s: float = setting(
        120.0, key="server.encode_timeout_s", gt=0, description="deadline of an encode, in seconds"
    )
    generate_timeout_s: float = setting(
        600.0, key="server.generate_timeout_s", gt=0, description="deadline of a picture, waiting included, in seconds"
    )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return self.host, self.port

    @model_validator(mode="after")
    def _api_encoder_has_a_url(self) -> Self:
        if self.use_api_encoder and self.api_url is None:
            raise PydanticCustomError(
                "zimage_api_url", "--use-api-encoder needs the URL of a backend: give --api-url too"
            )
        return self
