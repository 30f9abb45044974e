"""What the gateway is told: its address, where the services are, and the defaults of a request's fields."""

from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, model_validator
from pydantic_core import PydanticCustomError

from shared.addresses import ANY_HOST, HostPatterns, ServiceUrls, is_loopback
from shared.schemas.fields import (
    MAX_TIMEOUT_S,
    Alpha,
    BlendMode,
    GuidanceScale,
    HiddenLayer,
    LongPromptMode,
    OutlierMasking,
    PreviewEvery,
    Shift,
    Side,
    Steps,
    StyleShare,
    VlLayer,
)
from shared.settings import DEFAULT_MAX_PIXELS, DataSettings, UpstreamSettings, VisionSettings, setting
from shared.templates import DEFAULT_DIR


def _of_redis(url: str) -> str:
    try:
        parts = urlsplit(url)
        known = bool(parts.path) if parts.scheme == "unix" else parts.scheme in ("redis", "rediss") and parts.port != 0
    except ValueError:  # a port or a bracket that is none
        known = False
    if not known:
        raise PydanticCustomError(
            "zimage_redis_url", "this is no URL of a Redis: write redis://host:6379/0, rediss://... or unix:///path"
        )
    return url


RedisUrl = Annotated[str, AfterValidator(_of_redis)]


class GatewaySettings(UpstreamSettings, DataSettings, VisionSettings):
    """Settings of the gateway."""

    host: str = setting("127.0.0.1", key="server.host", panel="Server", description="Server host.")
    port: int = setting(7860, key="server.port", panel="Server", ge=0, le=65535, description="Server port.")
    allowed_hosts: HostPatterns = setting(
        (),
        key="server.allowed_hosts",
        description="names of hosts that requests may be for, such as *.example.com or *, beside addresses, localhost "
        "and names of the own network; where none is given there is no other on a loopback address, else every name",
    )
    encoder_only: bool = setting(
        default=False, key="server.encoder_only", panel="Server", description="Load only the encoder (no DiT/VAE)."
    )
    use_api_encoder: bool = setting(
        default=False,
        key="api.use_encoder",
        panel="Server",
        description="Use the API backend for encoding (local is default).",
    )
    api_model: str | None = setting(
        None, key="api.model", panel="API backend", description="Model ID for the API backend."
    )
    diffusion_urls: ServiceUrls = setting(
        (),
        key="diffusion.urls",
        panel="Nodes",
        description="Base URLs of diffusion services, with commas between them; they take the place of a local one.",
    )
    rewriter_urls: ServiceUrls = setting(
        (),
        key="rewriter.urls",
        panel="Nodes",
        description="Base URLs of rewriters, with commas between them; they take the place of a local one.",
    )
    vl_urls: ServiceUrls = setting(
        (),
        key="vl.urls",
        panel="Nodes",
        description="Base URLs of vl services, with commas between them; they take the place of a local one.",
    )
    redis_url: RedisUrl | None = setting(
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
    preview_every: PreviewEvery = setting(
        3, key="generation.preview_every", description="steps between two previews in a stream of events; 0 is none"
    )
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
    vl_alpha: Alpha = setting(
        0.3, key="vl.default_alpha", panel="Vision", description="Influence of the picture: 0.0=text only, 1.0=VL only."
    )
    vl_hidden_layer: VlLayer = setting(
        -2, key="vl.default_hidden_layer", panel="Vision", description="Hidden layer to extract (-1 to -6)."
    )
    vl_blend_mode: BlendMode = setting(
        BlendMode.LINEAR, key="vl.default_blend_mode", description="how a reference is blended in by default"
    )
    vl_outlier_masking: OutlierMasking = setting(
        OutlierMasking.OFF,
        key="vl.outlier_masking",
        description="what becomes of a reference's dimensions that spread far more than the prompt's: "
        "off, zero, clamp or scale",
    )
    vl_style_share: StyleShare = setting(
        1 / 3, key="vl.style_share", description="share of the dimensions, the last ones, that style_only blends"
    )
    encoding_cache_bytes: int = setting(
        256 << 20,
        key="encoder.cache_bytes",
        ge=0,
        description="bytes of encoded prompts that Redis keeps for all gateways; 0 keeps none",
    )
    encoding_cache_ttl_s: float = setting(
        86_400.0, key="encoder.cache_ttl_s", gt=0, description="seconds that they are kept after their last use"
    )
    vl_cache_bytes: int = setting(
        256 << 20, key="vl.cache_bytes", ge=1 << 20, description="bytes of extracted embeddings that Redis keeps"
    )
    vl_cache_ttl_s: float = setting(
        7 * 86_400.0, key="vl.cache_ttl_s", gt=0, description="seconds that embeddings are kept after their last use"
    )
    vl_timeout_s: float = setting(
        300.0, key="server.vl_timeout_s", gt=0, description="deadline of an extraction, waiting included, in seconds"
    )
    max_pixels: int = setting(
        DEFAULT_MAX_PIXELS, key="generation.max_pixels", ge=256, description="largest width x height of a picture"
    )
    max_upload_bytes: int = setting(
        256 << 20,
        key="server.max_upload_bytes",
        ge=32 << 20,
        description="bytes that bodies with pictures, of more than 2 MiB each, may have at the same time; beyond it a "
        "request is refused",
    )
    encode_timeout_s: float = setting(
        120.0, key="server.encode_timeout_s", gt=0, description="deadline of an encode, in seconds"
    )
    rewrite_timeout_s: float = setting(
        300.0, key="server.rewrite_timeout_s", gt=0, description="deadline of a rewriting, in seconds"
    )
    generate_timeout_s: float = setting(
        600.0,
        key="server.generate_timeout_s",
        gt=0,
        le=MAX_TIMEOUT_S,
        description="deadline of a picture, waiting included, in seconds",
    )
    resend_timeout_s: float = setting(
        120.0,
        key="server.resend_timeout_s",
        ge=0,
        description="seconds that a picture whose diffusion service ended waits for one to be there again",
    )

    @property
    def diffusions(self) -> tuple[str, ...]:
        """The diffusion services' base URLs; where none are given, that of one on this machine."""
        return tuple(map(str, self.diffusion_urls)) or ("http://127.0.0.1:7864",)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return self.host, self.port

    @property
    def hosts(self) -> tuple[str, ...]:
        """The patterns of `allowed_hosts`. Where none are given a server that other machines reach answers to every
        name, as it is not known which of them are its own."""
        return self.allowed_hosts or (() if is_loopback(self.host) else (ANY_HOST,))

    @model_validator(mode="after")
    def _api_encoder_has_a_url(self) -> Self:
        if self.use_api_encoder and self.api_url is None:
            raise PydanticCustomError(
                "zimage_api_url", "--use-api-encoder needs the URL of a backend: give --api-url too"
            )
        return self
