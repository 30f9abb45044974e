"""Fields with their limits, each written once; a service checks them again because it does not trust its caller."""

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_PROMPT_CHARS = 32_000
MAX_SIDE_PX = 8192  # 512 patches of 16 px: the image axes of the position embedding
SIDE_MULTIPLE_PX = 16  # VAE factor 8 times patch 2
MAX_STEPS = 100
MAX_GUIDANCE = 30.0
MIN_SHIFT, MAX_SHIFT = 0.001, 100.0  # of a smaller one, the schedule of float32 numbers begins with 0 / 0
MAX_SEED = 2**63 - 1
MAX_CFG_NORMALIZATION = 10.0
MAX_IMAGES = 8
MAX_LORAS = 8
MAX_LORA_SCALE = 10.0
MAX_TIMEOUT_S = 86_400.0
MAX_WRITTEN_TOKENS = 32_768
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0
MAX_REFERENCES = 4
ROUNDING = 1e-6  # of shares that add up to 1 on paper
DEEPEST_VL_LAYER = -6
DEEPEST_LAYER = -256  # of any model; the encoder knows its own depth


class LongPromptMode(StrEnum):
    """How a prompt beyond the DiT's text limit is made to fit."""

    TRUNCATE = "truncate"
    INTERPOLATE = "interpolate"
    POOL = "pool"
    ATTENTION_POOL = "attention_pool"


class BlendMode(StrEnum):
    """How the hidden states of a reference picture are blended into those of a prompt."""

    LINEAR = "linear"
    STYLE_ONLY = "style_only"
    GRADUATED = "graduated"
    ATTENTION_WEIGHTED = "attention_weighted"


class OutlierMasking(StrEnum):
    """What becomes of a reference's dimensions whose spread is many times that of the prompt's."""

    OFF = "off"
    ZERO = "zero"
    CLAMP = "clamp"
    SCALE = "scale"


class Priority(StrEnum):
    """Which waiting pictures are begun first; among equals the oldest."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class RequestModel(BaseModel):
    """Base of request bodies: strict types, and a field that does not exist is an error, not ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def _encodable(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("zimage_nul", "must not contain the NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("zimage_surrogate", "must not contain half of a surrogate pair") from None
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("zimage_blank", "must not be empty or only white space")
    return text


def _switch_as_number(value: Any) -> Any:
    return float(value) if isinstance(value, bool) else value


def multiple_of(step: int) -> Callable[[int], int]:
    """A check that a whole number is a multiple of `step`."""

    def check(value: int) -> int:
        if value % step:
            raise PydanticCustomError("zimage_multiple", "must be a multiple of {step}", {"step": step})
        return value

    return check


def at_most_one(alphas: list[float]) -> list[float]:
    """A check that the shares of several references leave none below 0 for the prompt; rounding is let pass."""
    if sum(alphas) > 1 + ROUNDING:
        raise PydanticCustomError("zimage_alphas", "must have alphas that add up to at most 1")
    return alphas


Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARS), AfterValidator(_encodable)]
Prompt = Annotated[Text, AfterValidator(_not_blank)]
Name = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_encodable)]
Side = Annotated[int, Field(ge=SIDE_MULTIPLE_PX, le=MAX_SIDE_PX), AfterValidator(multiple_of(SIDE_MULTIPLE_PX))]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
GuidanceScale = Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)]
Shift = Annotated[float, Field(ge=MIN_SHIFT, le=MAX_SHIFT, allow_inf_nan=False)]
CfgNormalization = Annotated[
    float, Field(ge=0, le=MAX_CFG_NORMALIZATION, allow_inf_nan=False), BeforeValidator(_switch_as_number)
]
CfgTruncation = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
LoraScale = Annotated[float, Field(ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE, allow_inf_nan=False)]
NumImages = Annotated[int, Field(ge=1, le=MAX_IMAGES)]
PreviewEvery = Annotated[int, Field(ge=0, le=MAX_STEPS)]
TimeoutS = Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S, allow_inf_nan=False)]
HiddenLayer = Annotated[int, Field(ge=DEEPEST_LAYER, le=-1)]
VlLayer = Annotated[int, Field(ge=DEEPEST_VL_LAYER, le=-1)]
Alpha = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
StyleShare = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=0, le=1_000_000)]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY, allow_inf_nan=False)]
WrittenTokens = Annotated[int, Field(ge=1, le=MAX_WRITTEN_TOKENS)]
