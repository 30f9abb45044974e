"""OpenAI's chat completions, as far as the encoder speaks them.

A field that would change the answer in a way that is not offered is refused unless it has its neutral value.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from shared.schemas.fields import (
    Name,
    Penalty,
    RequestModel,
    Seed,
    Share,
    Temperature,
    Text,
    TopK,
    WrittenTokens,
)

MAX_MESSAGES = 128
MAX_PARTS = 32
MAX_STOPS = 4
MAX_STOP_CHARS = 128
DONE = "[DONE]"
"""The data of a stream's last event."""

FinishReason = Literal["stop", "length"]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS), *Text.__metadata__[1:]]


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "(one)"  # no name that a field could have, as it stands among those in an error
    return "(many)" if isinstance(value, list) else None


class TextPart(RequestModel):
    """A part of a message; other kinds than text are not read."""

    type: Literal["text"]
    text: Text


class ChatMessage(RequestModel):
    """One turn of a conversation. Fields that a client sends back with an assistant's turn are not looked at."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("(one)")]
        | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS), Tag("(many)")],
        Discriminator(_kind, "zimage_content", "must be a string or a list of text parts"),
    ]

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(RequestModel):
    """What a stream holds besides the text."""

    include_usage: bool = Field(default=False, description="End with an event that counts the tokens.")


class TemplateOptions(RequestModel):
    """What the chat template is told."""

    enable_thinking: bool | None = Field(None, description="Whether the model may think before it answers.")


class TextFormat(RequestModel):
    """The form of the answer; there is only plain text."""

    type: Literal["text"]


class ChatRequest(RequestModel):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="The conversation so far.", examples=[[{"role": "user", "content": "Describe a cat."}]]
    )
    model: Name | None = Field(
        None, description="Accepted for compatibility; a node serves one model.", examples=["Qwen3-4B"]
    )
    max_tokens: WrittenTokens | None = Field(
        None, description="Tokens to write at most. Default 2048, or what there is room for.", examples=[256]
    )
    max_completion_tokens: WrittenTokens | None = Field(None, description="The newer name of `max_tokens`.")
    temperature: Temperature | None = Field(None, description="0 takes the likeliest token. Default 1.", examples=[0.7])
    top_p: Share | None = Field(None, description="Nucleus sampling threshold. Default 1.")
    top_k: TopK | None = Field(None, description="Draw from so many tokens only; 0 is off. Default 0.")
    min_p: Share | None = Field(None, description="Minimum share of the likeliest token's chance. Default 0.")
    presence_penalty: Penalty | None = Field(None, description="Makes tokens that were written once less likely.")
    frequency_penalty: Penalty | None = Field(None, description="The same for each time that a token was written.")
    seed: Seed | None = Field(None, description="Seed of the drawing; null draws one.", examples=[42])
    stop: (
        Annotated[
            Annotated[Stop, Tag("(one)")] | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag("(many)")],
            Discriminator(_kind, "zimage_stop", "must be a string or a list of strings"),
        ]
        | None
    ) = Field(None, description="The text ends before the first of these.")
    stream: bool | None = Field(None, description="Send the text as it comes.")
    stream_options: StreamOptions | None = None
    chat_template_kwargs: TemplateOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="Accepted and not used.")
    n: Literal[1] | None = Field(None, description="One answer a request.")
    logprobs: Literal[False] | None = Field(None, description="Not offered.")
    response_format: TextFormat | None = Field(None, description="Plain text.")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def enable_thinking(self) -> bool | None:
        """Whether the model may think; None leaves it to its template."""
        return self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None


class Usage(BaseModel):
    """How many tokens were read and written."""

    prompt_tokens: int = Field(examples=[14])
    completion_tokens: int = Field(examples=[120])
    total_tokens: int = Field(examples=[134])


class AnswerMessage(BaseModel):
    """The assistant's turn, or a piece of it."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=lambda value: value is None)
    content: str = Field(examples=["A tabby cat sleeps on a sunlit sill."])


class ChatChoice(BaseModel):
    """The one answer of a request."""

    index: int = 0
    message: AnswerMessage
    finish_reason: FinishReason = Field(examples=["stop"])


class ChatAnswer(BaseModel):
    """The answer of `POST /v1/chat/completions`."""

    id: str = Field(examples=["chatcmpl-3f1c0a5b7d2e4c69"])
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Seconds since 1970.", examples=[1733285000])
    model: str = Field(examples=["Qwen3-4B"])
    choices: list[ChatChoice]
    usage: Usage


class ChunkChoice(BaseModel):
    """A piece of the one answer."""

    index: int = 0
    delta: AnswerMessage
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """The data of one event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice] = []
    usage: Usage | None = Field(default=None, exclude_if=lambda value: value is None)
