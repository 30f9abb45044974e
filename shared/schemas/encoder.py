"""The encoder's bodies. `/v1/hidden_states` is the endpoint that heylookitsanllm serves, so either can stand in."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from shared.schemas.fields import HiddenLayer, Name, RequestModel, Text
from shared.schemas.node import NodeFacts

FINGERPRINT = "fingerprint"
"""The metadata entry of an answer in safetensors that tells which model it comes from."""
MAX_INPUTS = 64
MAX_INPUT_CHARS = 4 * 32_000 + 1_000  # the four parts of a prompt and the marks between them


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "(text)"  # no name that a field could have, as it stands among those in an error
    return "(texts)" if isinstance(value, list) else None


Input = Annotated[str, Field(min_length=1, max_length=MAX_INPUT_CHARS), *Text.__metadata__[1:]]
Inputs = Annotated[list[Input], Field(min_length=1, max_length=MAX_INPUTS)]
InputOrInputs = Annotated[
    Annotated[Input, Tag("(text)")] | Annotated[Inputs, Tag("(texts)")],
    Discriminator(_kind, "zimage_input", "must be a string or a list of strings"),
]


class TextsRequest(RequestModel):
    """One text or several, for the model."""

    input: InputOrInputs = Field(description="One text or several.", examples=["A cat sleeping"])

    @property
    def texts(self) -> list[str]:
        """The input as a list."""
        return [self.input] if isinstance(self.input, str) else list(self.input)


class HiddenStatesRequest(TextsRequest):
    """Texts whose hidden states are wanted, with the chat format already applied."""

    input: InputOrInputs = Field(
        description="One text or several, already in the chat format.",
        examples=["<|im_start|>user\nA cat sleeping<|im_end|>\n<|im_start|>assistant\n"],
    )
    model: Name | None = Field(None, description="Accepted for compatibility; a node serves one model.")
    layer: HiddenLayer = Field(-2, description="Which hidden states: -1 is the last layer's, after the final norm.")
    max_length: Annotated[int, Field(ge=1, le=1 << 20)] | None = Field(
        None, description="Keep at most this many tokens from the start."
    )
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="Form of `hidden_states` in a JSON answer."
    )


class HiddenStates(BaseModel):
    """The hidden states of one text, of shape [tokens, width]."""

    hidden_states: list[list[float]] | str = Field(
        description="Rows of numbers, or base64 of float32 little-endian in row order."
    )
    shape: list[int] = Field(examples=[[10, 2560]])
    model: str = Field(examples=["Qwen3-4B"])
    layer: int = Field(examples=[-2])
    dtype: str = Field(description="The model's own dtype.", examples=["bfloat16"])
    encoding_format: Literal["float", "base64"]


class TokenizeRequest(TextsRequest):
    """Texts whose tokens are wanted."""


class Tokens(BaseModel):
    """Token ids, a list for each text, and how many there are."""

    tokens: list[list[int]] = Field(examples=[[[32, 8251, 21220]]])
    counts: list[int] = Field(examples=[[3]])


class EncoderFacts(NodeFacts):
    """`GET /v1/model` of the encoder. Equal fingerprints mean equal hidden states."""

    width: int = Field(description="Length of a hidden state.", examples=[2560])
    layers: int = Field(examples=[36])


class ModelInfo(BaseModel):
    """One model, as OpenAI's list has it, with what the gateway wants to know."""

    id: str = Field(examples=["Qwen3-4B"])
    object: Literal["model"] = "model"
    owned_by: str = "zimage"
    device: str = Field(examples=["cpu"])
    dtype: str = Field(examples=["bfloat16"])
    width: int = Field(description="Length of a hidden state.", examples=[2560])
    layers: int = Field(examples=[36])


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]
