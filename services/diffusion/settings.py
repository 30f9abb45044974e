"""What the diffusion service is told."""

from shared.settings import DEFAULT_MAX_PIXELS, Device, Dtype, ModelSettings, setting


class DiffusionSettings(ModelSettings):
    """Settings of the diffusion service."""

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
        Dtype.AUTO, key="diffusion.dtype", description="number format of the weights; auto is the checkpoint's own"
    )
    max_pixels: int = setting(
        DEFAULT_MAX_PIXELS, key="generation.max_pixels", ge=256, description="largest width x height of a picture"
    )
    diffusion_max_waiting: int = setting(
        32, key="diffusion.max_waiting", ge=1, description="pictures that may wait; beyond it a request is refused"
    )
    png_compression: int = setting(
        1, key="diffusion.png_compression", ge=0, le=9, description="zlib level of the PNG; 1 is quick, hardly larger"
    )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return self.diffusion_host, self.diffusion_port
