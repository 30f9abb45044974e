"""What the gateway is told: its address, where the services are, and the defaults of a request's fields."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AnyHttpUrl, Field, UrlConstraints, field_validator

from shared.schemas.fields import GuidanceScale, HiddenLayer, LongPromptMode, Shift, Side, Steps
from shared.settings import DEFAULT_MAX_PIXELS, ServiceSettings
from shared.templates import DEFAULT_DIR

ServiceUrl = Annotated[AnyHttpUrl, UrlConstraints(allowed_schemes=["http", "https"])]


class GatewaySettings(ServiceSettings):
    """Settings of the gateway."""

    port: int = Field(7860, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    encoder_url: ServiceUrl = Field(AnyHttpUrl("http://127.0.0.1:7861"), description="base URL of the encoder")
    diffusion_url: ServiceUrl = Field(
        AnyHttpUrl("http://127.0.0.1:7864"), description="base URL of the diffusion service"
    )
    templates_dir: Path = Field(DEFAULT_DIR, description="folder of the templates")
    width: Side = Field(1024, description="width of a picture that names none, in pixels")
    height: Side = Field(1024, description="height of a picture that names none, in pixels")
    steps: Steps = Field(9, description="denoising steps of a picture that names none")
    guidance_scale: GuidanceScale = Field(0.0, description="guidance scale; 0 for Z-Image Turbo")
    shift: Shift = Field(3.0, description="shift of the noise schedule")
    long_prompt_mode: LongPromptMode = Field(
        LongPromptMode.INTERPOLATE, description="how prompts beyond the text limit are fitted"
    )
    hidden_layer: HiddenLayer = Field(-2, description="hidden layer that the embeddings are read from")
    max_pixels: int = Field(DEFAULT_MAX_PIXELS, ge=256, description="largest width x height of a picture")
    encode_timeout_s: float = Field(120.0, gt=0, description="deadline of an encode")
    generate_timeout_s: float = Field(600.0, gt=0, description="deadline of a picture, waiting included")

    @field_validator("width", "height", "steps", "guidance_scale", "shift", "hidden_layer", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """The environment holds text, while the fields are as strict as those of a request."""
        if not isinstance(value, str):
            return value
        try:
            return int(value)
        except ValueError:
            pass
        try:
            return float(value)
        except ValueError:
            return value
