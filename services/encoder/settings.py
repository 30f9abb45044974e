"""What the encoder is told."""

from shared.settings import Device, Dtype, ModelSettings, setting


class EncoderSettings(ModelSettings):
    """Settings of the encoder service."""

    encoder_host: str = setting("127.0.0.1", key="encoder.host", description="address that the encoder listens on")
    encoder_port: int = setting(7861, key="encoder.port", ge=0, le=65535, description="its port; 0 picks a free one")
    text_encoder_device: Device = setting(
        Device.AUTO,
        key="devices.text_encoder",
        panel="Model & device",
        description="Device for the text encoder (cpu/cuda/mps/auto).",
    )
    text_encoder_dtype: Dtype = setting(
        Dtype.AUTO, key="encoder.dtype", description="number format of the weights; auto is the checkpoint's own"
    )
    encoder_max_batch_tokens: int = setting(
        4096, key="encoder.max_batch_tokens", ge=1, description="tokens, padding included, that share a forward"
    )
    encoder_max_batch_texts: int = setting(
        64, key="encoder.max_batch_texts", ge=1, description="texts that share a forward"
    )
    encoder_max_waiting: int = setting(
        512, key="encoder.max_waiting", ge=1, description="texts that may wait; beyond it a request is refused"
    )
    encoder_max_tokens: int = setting(
        40_960, key="encoder.max_tokens", ge=1, description="tokens of one text; beyond it a request is refused"
    )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return self.encoder_host, self.encoder_port
