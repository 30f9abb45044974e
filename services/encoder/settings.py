"""What the encoder is told: `ZIMAGE_ENCODER_...` for its own, `ZIMAGE_...` for what the command line calls the same."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from shared.settings import Device, Dtype, ServiceSettings


class EncoderSettings(ServiceSettings):
    """Settings of the encoder service."""

    model_config = SettingsConfigDict(env_prefix="ZIMAGE_ENCODER_")

    model_path: Path | None = Field(
        None, validation_alias="ZIMAGE_MODEL_PATH", description="a Z-Image directory with text_encoder and tokenizer"
    )
    device: Device = Field(
        Device.AUTO, validation_alias="ZIMAGE_TEXT_ENCODER_DEVICE", description="device for the text encoder"
    )
    dtype: Dtype = Field(Dtype.AUTO, description="number format of the weights; auto is the checkpoint's own")
    max_batch_tokens: int = Field(4096, ge=1, description="tokens, padding included, that share a forward")
    max_batch_texts: int = Field(64, ge=1, description="texts that share a forward")
    max_waiting: int = Field(512, ge=1, description="texts that may wait; beyond it a request is refused")
    max_tokens: int = Field(40_960, ge=1, description="tokens of one text; beyond it a request is refused")
