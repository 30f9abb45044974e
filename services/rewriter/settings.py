"""What the rewriter is told. The service itself is not written yet; its flags are checked already."""

from typing import Annotated

from pydantic import AnyHttpUrl, Field, UrlConstraints

from shared.settings import ServiceSettings, setting

ServiceUrl = Annotated[AnyHttpUrl, UrlConstraints(allowed_schemes=["http", "https"])]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class RewriterSettings(ServiceSettings):
    """Settings of the rewriter service."""

    rewriter_host: str = setting("127.0.0.1", key="rewriter.host", description="address that the rewriter listens on")
    rewriter_port: int = setting(7862, key="rewriter.port", ge=0, le=65535, description="its port; 0 picks a free one")
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
    rewriter_temperature: Temperature = setting(
        1.0, key="rewriter.temperature", panel="Rewriter", description="Sampling temperature."
    )
    rewriter_top_p: Share = setting(
        0.95, key="rewriter.top_p", panel="Rewriter", description="Nucleus sampling threshold."
    )
    rewriter_min_p: Share = setting(
        0.0, key="rewriter.min_p", panel="Rewriter", description="Minimum probability threshold (0.0 = disabled)."
    )
    rewriter_max_tokens: int = setting(
        512, key="rewriter.max_tokens", panel="Rewriter", ge=1, le=32_768, description="Maximum tokens to generate."
    )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return self.rewriter_host, self.rewriter_port
