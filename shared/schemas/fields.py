"""Fields with their limits, each written once; a service checks them again because it does not trust its caller."""

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_PROMPT_CHARS = 32_000
MAX_SIDE_PX = 8192  # 512 patches of 16 px: the image axes of the position embedding
SIDE_MULTIPLE_PX = 16  # VAE factor 8 times patch 2
MAX_STEPS = 100
MAX_GUIDANCE = 30.0
MAX_SHIFT = 100.0
MAX_SEED = 2**63 - 1
DEEPEST_LAYER = -256  # of any model; the encoder knows its own depth


class LongPromptMode(StrEnum):
    """How a prompt beyond the DiT's text limit is made to fit."""

    TRUNCATE = "truncate"
    INTERPOLATE = "interpolate"
    POOL = "pool"
    ATTENTION_POOL = "attention_pool"


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


def multiple_of(step: int) -> Callable[[int], int]:
    """A check that a whole number is a multiple of `step`."""

    def check(value: int) -> int:
        if value % step:
            raise PydanticCustomError("zimage_multiple", "must be a multiple of {step}", {"step": step})
        return value

    return check


Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARS), AfterValidator(_encodable)]
Prompt = Annotated[Text, AfterValidator(_not_blank)]
Name = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_encodable)]
Side = Annotated[int, Field(ge=SIDE_MULTIPLE_PX, le=MAX_SIDE_PX), AfterValidator(multiple_of(SIDE_MULTIPLE_PX))]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
GuidanceScale = Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)]
Shift = Annotated[float, Field(gt=0, le=MAX_SHIFT, allow_inf_nan=False)]
HiddenLayer = Annotated[int, Field(ge=DEEPEST_LAYER, le=-1)]
