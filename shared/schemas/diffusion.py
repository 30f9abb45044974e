"""The diffusion service's bodies. Its request is one safetensors message; these parameters travel in its metadata."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field

from shared.schemas.fields import (
    MAX_LORAS,
    MAX_REFERENCES,
    Alpha,
    BlendMode,
    CfgNormalization,
    CfgTruncation,
    GuidanceScale,
    LongPromptMode,
    LoraScale,
    Name,
    OutlierMasking,
    PreviewEvery,
    Priority,
    RequestModel,
    Seed,
    Shift,
    Side,
    Steps,
    StyleShare,
    TimeoutS,
    at_most_one,
)
from shared.schemas.node import NodeFacts

TEXT = "text"
NEGATIVE = "negative"
REFERENCE = "vl"
PARAMETERS = "parameters"
"""Names of the tensors, each [tokens, width] (of several references `vl`, `vl.1`, `vl.2`), and of the metadata entry
that holds `DiffusionParameters` as JSON."""


THUMBNAIL_HEADER = "X-Thumbnail"
"""A small JPEG of the picture in base64, some kilobytes."""

QUEUED, STEP, PREVIEW, DONE = "queued", "step", "preview", "done"
"""Names of the events; a stream that fails ends with `error` and a problem instead of `done`."""


class LoraChoice(RequestModel):
    """A LoRA of the server's folder and how much of it."""

    name: Name = Field(description="As GET /api/loras lists it.", examples=["ink"])
    scale: LoraScale = Field(1.0, description="0 leaves it out.", examples=[0.8])


Loras = Annotated[list[LoraChoice], Field(max_length=MAX_LORAS)]


class Blending(RequestModel):
    """How reference pictures are blended into the prompt; `alphas` has the share of each, in the tensors' order."""

    mode: BlendMode
    alphas: Annotated[list[Alpha], Field(min_length=1, max_length=MAX_REFERENCES), AfterValidator(at_most_one)]
    style_share: StyleShare
    outlier_masking: OutlierMasking = OutlierMasking.OFF

    @property
    def alpha(self) -> float:
        """The share of all references together."""
        return min(1.0, sum(self.alphas))


class DiffusionParameters(RequestModel):
    """Everything but the embeddings that determines a picture, and what is to be done about its making.

    What determines the picture has no default, as the gateway decides; what was added later is off by default.
    """

    width: Side
    height: Side
    steps: Steps
    seed: Seed
    guidance_scale: GuidanceScale
    shift: Shift
    long_prompt_mode: LongPromptMode
    cfg_normalization: CfgNormalization = 0.0
    cfg_truncation: CfgTruncation = 1.0
    loras: Loras | None = None
    priority: Priority = Priority.NORMAL
    timeout_s: TimeoutS | None = None
    preview_every: PreviewEvery = 0
    blending: Blending | None = None

    @property
    def references(self) -> Sequence[str]:
        """The names of the tensors of the reference pictures: `vl`, and of several the others `vl.1`, `vl.2`."""
        count = 0 if self.blending is None else len(self.blending.alphas)
        return [f"{REFERENCE}.{index}" if index else REFERENCE for index in range(count)]


class Queued(BaseModel):
    """Event `queued`: the picture waits; told again whenever its place changes."""

    id: str | None = Field(description="What DELETE takes to give the picture up.", examples=["3f1c0a5b7d2e4c69"])
    place: int = Field(description="1 is begun next.", examples=[2])


class Stepped(BaseModel):
    """Event `step`: a denoising step is done."""

    step: int = Field(examples=[3])
    steps: int = Field(examples=[9])
    seconds_left: float = Field(description="Estimated from the steps so far.", examples=[1.25])


class Preview(BaseModel):
    """Event `preview`: what the picture looks like so far, an eighth of its size."""

    step: int = Field(examples=[3])
    image_b64: str = Field(description="A JPEG.")


class Done(BaseModel):
    """Event `done`: the PNG, and the headers that come with it in the plain form."""

    headers: dict[str, str] = Field(examples=[{"X-Seed": "42", "X-Generation-Time": "1.234"}])
    image_b64: str = Field(description="The PNG.", examples=["iVBORw0KGgo="])


PROGRESS: Mapping[str, type[BaseModel]] = MappingProxyType({QUEUED: Queued, STEP: Stepped, PREVIEW: Preview})
"""The events that come before `done`, by their names."""


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


class DiffusionFacts(NodeFacts):
    """`GET /v1/model` of the diffusion service: what the loaded checkpoint takes."""

    text_width: int = Field(description="Length of a hidden state that the DiT reads.", examples=[2560])
    text_limit: int = Field(description="Tokens of text that the DiT reads; longer ones are fitted.", examples=[1504])
    max_pixels: int = Field(examples=[4_200_000])


class LoraEntry(BaseModel):
    """A LoRA of the server's folder."""

    name: str = Field(description="What `loras` takes.", examples=["ink"])
    bytes: int = Field(examples=[85_000_000])
    rank: int | None = Field(description="None where the file has several.", examples=[16])
    metadata: dict[str, str] = Field(description="What the file says of itself.")
    default: float | None = Field(
        default=None, description="Its scale in pictures that name no LoRAs; none where it is not used then."
    )


class LoraList(BaseModel):
    """`GET /v1/loras` and `GET /api/loras`."""

    loras: list[LoraEntry]


class CancelledAnswer(BaseModel):
    """`DELETE /v1/generate/{id}` and `DELETE /api/generate/{id}`."""

    cancelled: str = Field(examples=["3f1c0a5b7d2e4c69"])
