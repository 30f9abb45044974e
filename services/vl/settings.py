"""What the vl service is told. The service itself is not written yet; its flags are checked already."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from shared.settings import Device, ServiceSettings, setting

PUBLISHED_TARGET_STD = 58.75  # standard deviation of Qwen3-4B's hidden states -2, which vision states are scaled to
Alpha = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
VlLayer = Annotated[int, Field(ge=-6, le=-1)]


class VlSettings(ServiceSettings):
    """Settings of the vl service."""

    vl_host: str = setting("127.0.0.1", key="vl.host", description="address that the vl service listens on")
    vl_port: int = setting(7863, key="vl.port", ge=0, le=65535, description="its port; 0 picks a free one")
    vl_model_path: Path | None = setting(
        None,
        key="vl.model_path",
        panel="Vision",
        description="Path to the Qwen3-VL model; enables vision conditioning.",
    )
    vl_device: Device = setting(
        Device.CPU, key="vl.device", panel="Vision", description="Device for Qwen3-VL (cpu/cuda/mps/auto)."
    )
    vl_alpha: Alpha = setting(
        0.3, key="vl.default_alpha", panel="Vision", description="Influence of the picture: 0.0=text only, 1.0=VL only."
    )
    vl_hidden_layer: VlLayer = setting(
        -2, key="vl.default_hidden_layer", panel="Vision", description="Hidden layer to extract (-1 to -6)."
    )
    vl_auto_unload: bool = setting(
        default=True, key="vl.auto_unload", panel="Vision", description="Unload the model after an extraction."
    )
    vl_target_std: float = setting(
        PUBLISHED_TARGET_STD, key="vl.target_std", panel="Vision", gt=0, description="Scale VL embeddings to this."
    )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return self.vl_host, self.vl_port
