"""What the diffusion service is told."""

from typing import ClassVar

from services.diffusion.option_settings import OptionSettings
from shared.settings import DEFAULT_MAX_PIXELS, DataSettings, Device, Dtype, ModelSettings, setting


class DiffusionSettings(ModelSettings, DataSettings, OptionSettings):
    """Settings of the diffusion service."""

    parts: ClassVar[tuple[str, ...]] = ("transformer", "vae", "scheduler")

    diffusion_host: str = setting(
        "127.0.0.1", key="diffusion.host", description="address that the diffusion service listens on"
    )
    diffusion_port: int = setting(
        7864, key="diffusion.port", ge=0, le=65535, description="its port; 0 picks a free one"
    )
    dit_device: Device = setting(
        Device.AUTO,
        key="devices.dit",
        panel="Model & device",
        description="Device for the DiT transformer (cpu/cuda/mps/auto).",
    )
    vae_device: Device = setting(
        Device.AUTO,
        key="devices.vae",
        panel="Model & device",
        description="Device for the VAE (cpu/cuda/mps/auto).",
    )
    diffusion_dtype: Dtype = setting(
        Dtype.AUTO,
        key="diffusion.dtype",
        description="number format of the weights; auto is bfloat16 on a GPU, else the checkpoint's own",
    )
    max_pixels: int = setting(
        DEFAULT_MAX_PIXELS, key="generation.max_pixels", ge=256, description="largest width x height of a picture"
    )
    diffusion_max_waiting: int = setting(
        32, key="diffusion.max_waiting", ge=1, description="pictures that may wait; beyond it a request is refused"
    )
    diffusion_max_running: int = setting(
        32, key="diffusion.max_running", ge=1, description="pictures in the making at a time"
    )
    diffusion_max_batch: int = setting(
        8, key="diffusion.max_batch", ge=1, description="pictures that share a step of the DiT"
    )
    diffusion_max_batch_tokens: int = setting(
        0,
        key="diffusion.max_batch_tokens",
        ge=0,
        description="tokens that share a step; 0 is 8192 on CUDA, 4096 on MPS, 2560 on a CPU",
    )
    diffusion_memory_bytes: int | None = setting(
        None,
        key="diffusion.memory_bytes",
        ge=1,
        description="memory for the work itself, beyond the weights; by default what the device has free",
    )
    png_compression: int = setting(
        1, key="diffusion.png_compression", ge=0, le=9, description="zlib level of the PNG; 1 is quick, hardly larger"
    )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return self.diffusion_host, self.diffusion_port
