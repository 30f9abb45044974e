"""What the vl service is told."""

from shared.language.defaults import WritingSettings
from shared.settings import Dtype, NodeSettings, VisionSettings, setting


class VlSettings(NodeSettings, VisionSettings, WritingSettings):
    """Settings of the vl service."""

    vl_host: str = setting("127.0.0.1", key="vl.host", description="address that the vl service listens on")
    vl_port: int = setting(7863, key="vl.port", ge=0, le=65535, description="its port; 0 picks a free one")
    vl_dtype: Dtype = setting(
        Dtype.AUTO,
        key="vl.dtype",
        description="number format of the weights; auto is bfloat16 on a GPU, else the checkpoint's own",
    )
    vl_target_std: float | None = setting(
        None,
        key="vl.target_std",
        panel="Vision",
        gt=0,
        allow_inf_nan=False,
        description="Scale VL embeddings to this. Default: what the checkpoint carries, else 58.75.",
    )
    vl_max_pixels: int = setting(
        1 << 20,
        key="vl.max_pixels",
        ge=1 << 12,
        description="pixels that a picture is scaled down to before it is read; 1024 of them are a token",
    )
    vl_max_tokens: int = setting(
        8192, key="vl.max_tokens", ge=16, description="tokens of a picture and its text; beyond it a request is refused"
    )
    vl_max_waiting: int = setting(
        16, key="vl.max_waiting", ge=1, description="pictures that may wait; beyond it a request is refused"
    )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return self.vl_host, self.vl_port
