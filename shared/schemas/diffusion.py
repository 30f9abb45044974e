"""The diffusion service's bodies. Its request is one safetensors message; these parameters travel in its metadata."""

from pydantic import BaseModel, Field

from shared.schemas.fields import GuidanceScale, LongPromptMode, RequestModel, Seed, Shift, Side, Steps

TEXT = "text"
NEGATIVE = "negative"
PARAMETERS = "parameters"
"""Names of the tensors, each [tokens, width], and of the metadata entry that holds `DiffusionParameters` as JSON."""


THUMBNAIL_HEADER = "X-Thumbnail"
"""A small JPEG of the picture in base64, some kilobytes."""


class DiffusionParameters(RequestModel):
    """Everything but the embeddings that determines a picture; nothing has a default: the gateway decides."""

    width: Side
    height: Side
    steps: Steps
    seed: Seed
    guidance_scale: GuidanceScale
    shift: Shift
    long_prompt_mode: LongPromptMode


class RunningPicture(BaseModel):
    """A picture that is being made: `step` of `steps` are done."""

    request_id: str | None
    step: int
    steps: int


class Queue(BaseModel):
    """`GET /v1/queue`: what runs, how many wait and how many may."""

    running: list[RunningPicture]
    waiting: int = Field(examples=[3])
    max_waiting: int = Field(examples=[32])


class DiffusionFacts(BaseModel):
    """`GET /v1/model`: what the loaded checkpoint takes."""

    device: str = Field(examples=["cuda"])
    dtype: str = Field(examples=["bfloat16"])
    text_width: int = Field(description="Length of a hidden state that the DiT reads.", examples=[2560])
    text_limit: int = Field(description="Tokens of text that the DiT reads; longer ones are fitted.", examples=[1504])
    max_pixels: int = Field(examples=[4_200_000])
