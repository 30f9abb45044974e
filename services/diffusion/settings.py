"""What the diffusion service is told: `ZIMAGE_DIFFUSION_...`, and `ZIMAGE_...` for what the command line names."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from shared.settings import DEFAULT_MAX_PIXELS, Device, Dtype, ServiceSettings


class DiffusionSettings(ServiceSettings):
    """Settings of the diffusion service."""

    model_config = SettingsConfigDict(env_prefix="ZIMAGE_DIFFUSION_")

    model_path: Path | None = Field(
        None, validation_alias="ZIMAGE_MODEL_PATH", description="a Z-Image directory with transformer, vae, scheduler"
    )
    dit_device: Device = Field(Device.AUTO, validation_alias="ZIMAGE_DIT_DEVICE", description="device for the DiT")
    vae_device: Device = Field(Device.AUTO, validation_alias="ZIMAGE_VAE_DEVICE", description="device for the VAE")
    dtype: Dtype = Field(Dtype.AUTO, description="number format of the weights; auto is the checkpoint's own")
    max_pixels: int = Field(
        DEFAULT_MAX_PIXELS, ge=256, validation_alias="ZIMAGE_MAX_PIXELS", description="width x height of a picture"
    )
    max_waiting: int = Field(32, ge=1, description="pictures that may wait; beyond it a request is refused")
    png_compression: int = Field(1, ge=0, le=9, description="zlib level of the PNG; 1 is quick and hardly larger")
