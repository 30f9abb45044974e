"""What the encoder is told."""

from typing import ClassVar

from shared.settings import Device, Dtype, ModelSettings, Quantization, setting


class EncoderSettings(ModelSettings):
    """Settings of the encoder service."""

    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")

    encoder_host: str = setting("127.0.0.1", key="encoder.host", description="address that the encoder listens on")
    encoder_port: int = setting(7861, key="encoder.port", ge=0, le=65535, description="its port; 0 picks a free one")
    text_encoder_device: Device = setting(
        Device.AUTO,
        key="devices.text_encoder",
        panel="Model & device",
        description="Device for the text encoder (cpu/cuda/mps/auto).",
    )
    text_encoder_dtype: Dtype = setting(
        Dtype.AUTO,
        key="encoder.dtype",
        description="number format of the weights; auto is bfloat16 on a GPU, else the checkpoint's own",
    )
    text_encoder_quantization: Quantization = setting(
        Quantization.NONE,
        key="encoder.quantization",
        description="what torchao keeps the weights of its blocks in",
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

    encoder_max_writing: int = setting(
        8, key="encoder.max_writing", ge=1, description="texts of chat completions that are written together"
    )
    encoder_max_waiting_chats: int = setting(
        64,
        key="encoder.max_waiting_chats",
        ge=1,
        description="chat completions that may wait; beyond it one is refused",
    )
    encoder_max_cache_tokens: int = setting(
        40_960,
        key="encoder.max_cache_tokens",
        ge=256,
        description="tokens that the texts being written may hold together, prompts and padding included",
    )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return self.encoder_host, self.encoder_port
