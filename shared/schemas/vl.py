"""The bodies of vision conditioning: those of the public API, and those of the vl service behind it.

The service's request is one safetensors message: the picture's bytes as a tensor, the parameters in its metadata.
"""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from shared.schemas.fields import (
    MAX_REFERENCES,
    Alpha,
    BlendMode,
    Name,
    OutlierMasking,
    Prompt,
    RequestModel,
    StyleShare,
    Text,
    VlLayer,
    at_most_one,
)
from shared.schemas.node import NodeFacts
from shared.schemas.public import GenerateRequest
from shared.schemas.rewriter import RewriteOptions

IMAGE = "image"
PARAMETERS = "parameters"
"""Names of the tensor, U8 [bytes], and of the metadata entry that holds the parameters as JSON."""
STATES = "vl"
EXTRACTED = "extracted"
"""Names of the answer's tensor, [tokens, width], and of the metadata entry that holds `Extracted` as JSON."""

EXAMPLE_PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGO4pKEBAALyASPRKWJvAAAAAElFTkSuQmCC"
"""One red pixel, as a PNG."""

PictureText = Annotated[
    str,
    Field(description="The picture in base64, or as a data URL: PNG, JPEG or WEBP.", examples=[EXAMPLE_PICTURE]),
]
ReadText = Annotated[Text, Field(description="Text that is read together with the picture.")]


class ExtractParameters(RequestModel):
    """Everything but the picture that determines its hidden states."""

    text: Text | None = None
    hidden_layer: VlLayer
    image_tokens_only: bool
    scale_to_text: bool


class Extracted(BaseModel):
    """What is told of extracted hidden states; `fingerprint` is that of the model they come from."""

    fingerprint: str
    hidden_layer: int
    original_std: float
    scaled_std: float


class DescribeParameters(RewriteOptions):
    """`POST /v1/describe`: what to write about the picture."""

    prompt: Prompt
    system_prompt: Prompt | None = None


class VlFacts(NodeFacts):
    """`GET /v1/model` of the vl service. Equal fingerprints mean equal hidden states."""

    model_path: str = Field(examples=["/models/Qwen3-VL-4B-Instruct"])
    width: int = Field(description="Length of a hidden state.", examples=[2560])
    layers: int = Field(examples=[36])
    target_std: float = Field(description="What hidden states are scaled to.", examples=[58.75])
    auto_unload: bool
    loaded: bool = Field(description="Whether the weights are in memory now.")


class ExtractOptions(RequestModel):
    """`POST /api/vl/extract`, apart from the picture."""

    text: ReadText | None = None
    hidden_layer: VlLayer | None = Field(
        None, description="Hidden layer to extract, -1 to -6. Default -2.", examples=[-2]
    )
    image_tokens_only: bool = Field(default=False, description="Keep the hidden states of the picture's tokens only.")
    scale_to_text: bool = Field(default=True, description="Scale to the spread of the text encoder's hidden states.")


class ExtractRequest(ExtractOptions):
    """`POST /api/vl/extract` as JSON."""

    image: PictureText


class ExtractAnswer(BaseModel):
    """`POST /api/vl/extract`."""

    embeddings_id: str = Field(description="What /api/vl/generate takes.", examples=["vl_abc123_def4_L-2"])
    num_tokens: int = Field(examples=[256])
    shape: list[int] = Field(description="Tokens, and length of each hidden state.", examples=[[256, 2560]])
    hidden_layer: int = Field(examples=[-2])
    original_std: float = Field(description="Standard deviation before scaling.", examples=[13.25])
    scaled_std: float = Field(description="Standard deviation of what is kept.", examples=[58.75])
    extract_time: float = Field(description="Seconds.", examples=[2.34])


class VlReference(RequestModel):
    """One of several references: a picture, or an id of extracted embeddings, and its share."""

    embeddings_id: Name | None = Field(None, description="As /api/vl/extract answered it.")
    image: PictureText | None = None
    alpha: Alpha = Field(description="Influence of this reference.", examples=[0.3])

    @model_validator(mode="after")
    def _names_one_picture(self) -> Self:
        if (self.embeddings_id is None) == (self.image is None):
            raise PydanticCustomError(
                "zimage_reference", "must have in each entry either 'embeddings_id' or 'image', not both"
            )
        return self


def _alphas_add_up(references: list[VlReference]) -> list[VlReference]:
    at_most_one([reference.alpha for reference in references])
    return references


VlReferences = Annotated[
    list[VlReference], Field(min_length=1, max_length=MAX_REFERENCES), AfterValidator(_alphas_add_up)
]


class VlGenerateRequest(GenerateRequest):
    """`POST /api/vl/generate`: a picture from a prompt and from reference pictures."""

    vl_image: PictureText | None = None
    vl_embeddings_id: Name | None = Field(
        None, description="As /api/vl/extract answered it; wins over 'vl_image'.", examples=["vl_abc123_def4_L-2"]
    )
    vl_references: VlReferences | None = Field(
        None, description="Several references, whose alphas add up to at most 1, instead of one.", examples=[None]
    )
    vl_alpha: Alpha | None = Field(
        None, description="Influence of the reference: 0 is text only, 1 reference only. Default 0.3.", examples=[0.3]
    )
    vl_hidden_layer: VlLayer | None = Field(None, description="Hidden layer to extract. Default -2.", examples=[-2])
    vl_image_tokens_only: bool = Field(default=False, description="Use the picture's tokens only.")
    vl_text: ReadText | None = None
    vl_blend_mode: BlendMode | None = Field(
        None, strict=False, description="How the reference is blended in. Default linear.", examples=["linear"]
    )
    vl_outlier_masking: OutlierMasking | None = Field(
        None,
        strict=False,
        description="What becomes of dimensions that spread many times as far as the prompt's. Default off.",
        examples=["off"],
    )
    vl_style_share: StyleShare | None = Field(
        None, description="The share of dimensions, the last ones, that style_only blends. Default a third."
    )


class VlStatus(BaseModel):
    """`GET /api/vl/status`."""

    available: bool = Field(description="Whether pictures can be extracted now.")
    configured: bool = Field(description="Whether this server has a vl service.")
    model_path: str | None = Field(examples=["/models/Qwen3-VL-4B-Instruct"])
    device: str | None = Field(examples=["cpu"])
    default_alpha: float = Field(examples=[0.3])
    default_hidden_layer: int = Field(examples=[-2])
    blend_modes: list[BlendMode]
    cached_embeddings: list[str] = Field(description="Ids, those used last first.", examples=[["vl_abc123_def4_L-2"]])


class VlConfig(BaseModel):
    """`GET /api/vl/config`: the defaults of a request's fields."""

    alpha: float = Field(examples=[0.3])
    hidden_layer: int = Field(examples=[-2])
    auto_unload: bool
    blend_mode: BlendMode
    outlier_masking: OutlierMasking
    style_share: float


class VlDeletedAnswer(BaseModel):
    """`DELETE /api/vl/cache/{embeddings_id}`."""

    deleted: str = Field(examples=["vl_abc123_def4_L-2"])


VL_EXTRACT_EXAMPLES: dict[str, Any] = {
    "shortest": {"summary": "A picture and nothing else", "value": {"image": EXAMPLE_PICTURE}},
    "all fields": {
        "summary": "Every field with a value",
        "value": {
            "image": EXAMPLE_PICTURE,
            "text": "a red pixel",
            "hidden_layer": -2,
            "image_tokens_only": False,
            "scale_to_text": True,
        },
    },
}
VL_GENERATE_EXAMPLES: dict[str, Any] = {
    "one shot": {
        "summary": "A picture that is extracted on the way",
        "value": {"prompt": "A cat sleeping in sunlight", "vl_image": EXAMPLE_PICTURE, "vl_alpha": 0.3},
    },
    "extracted": {
        "summary": "A reference that was extracted before",
        "value": {
            "prompt": "A cat sleeping in sunlight",
            "vl_embeddings_id": "vl_abc123_def4_L-2",
            "vl_alpha": 0.3,
            "vl_blend_mode": "style_only",
            "seed": 42,
        },
    },
}
