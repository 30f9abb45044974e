"""The rewriter's bodies. A field that is left out (or null) takes the rewriter's default, which flags may change."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from shared.schemas.fields import Name, Penalty, Prompt, RequestModel, Seed, Share, Temperature, TopK, WrittenTokens

DONE = "done"
"""The event that ends a rewriting which is followed, with `Rewritten`; before it come `thinking` and `text`."""
REWRITTEN = "rewritten"
"""The event of a picture's stream that tells its rewritten prompt, with `RewriteAnswer`."""


class RewriteOptions(RequestModel):
    """How the language model writes."""

    max_tokens: WrittenTokens | None = Field(None, description="Tokens to write at most. Default 512.", examples=[512])
    temperature: Temperature | None = Field(
        None, description="Sampling temperature; 0 takes the likeliest token. Default 1.", examples=[1.0]
    )
    top_p: Share | None = Field(None, description="Nucleus sampling threshold. Default 0.95.", examples=[0.95])
    min_p: Share | None = Field(
        None, description="Minimum share of the likeliest token's chance; 0 is off. Default 0.", examples=[0.0]
    )
    top_k: TopK | None = Field(None, description="Draw from so many tokens only; 0 is off. Default 0.", examples=[0])
    presence_penalty: Penalty | None = Field(
        None, description="Makes tokens that were written already less likely. Default 0.", examples=[0.0]
    )
    seed: Seed | None = Field(None, description="Seed of the drawing; null draws one.", examples=[42])
    enable_thinking: bool | None = Field(
        None, description="Let the model think before it writes. Default true.", examples=[True]
    )


class RewriteChoice(RewriteOptions):
    """Which way to rewrite: a template's, or the system prompt that is given, which wins."""

    rewriter: Name | None = Field(
        None, description="Name of a rewriter template.", examples=["rewriter_character_generator"]
    )
    custom_system_prompt: Prompt | None = Field(
        None, description="System prompt for this rewriting.", examples=["Expand the prompt."]
    )


class RewriteRequest(RewriteChoice):
    """`POST /api/rewrite`."""

    prompt: Prompt = Field(description="The prompt to rewrite.", examples=["A cat sleeping"])
    image: str | None = Field(
        None,
        description="A picture in base64, or as a data URL: the vision-language model writes, the prompt is what is "
        "asked of it. Then neither 'rewriter' nor 'custom_system_prompt' is needed.",
        examples=[None],
    )


class RewritePrompt(RewriteOptions):
    """`POST /v1/rewrite`: a prompt, and the system prompt that says how to rewrite it."""

    prompt: Prompt = Field(examples=["A cat sleeping"])
    system_prompt: Prompt = Field(examples=["You rewrite short image prompts into one clear, complete prompt."])


class Rewritten(BaseModel):
    """What the language model wrote."""

    rewritten_prompt: str = Field(examples=["A fluffy orange tabby cat curled up in a warm sunbeam."])
    thinking_content: str | None = Field(examples=["A cosy scene with warm light."])
    backend: Literal["local", "api"]
    finish_reason: str | None = Field(
        description="`stop`, or `length` where `max_tokens` cut the text off.", examples=["stop"]
    )
    seed: int | None = Field(description="The seed of the drawing, null where another server drew it.", examples=[42])


class Piece(BaseModel):
    """The data of an event `thinking` or `text`."""

    text: str = Field(examples=["A fluffy orange"])


class RewriteAnswer(BaseModel):
    """`POST /api/rewrite`."""

    original_prompt: str = Field(examples=["A cat sleeping"])
    rewritten_prompt: str = Field(examples=["A fluffy orange tabby cat curled up in a warm sunbeam."])
    thinking_content: str | None = Field(
        description="What stood in `<think>...</think>`.", examples=["A cosy scene with warm light."]
    )
    rewriter: str | None = Field(examples=["rewriter_character_generator"])
    backend: Literal["local", "api"] = Field(description="`api` where another server wrote.")
    gen_time: float = Field(description="Seconds.", examples=[2.5])
    finish_reason: str | None = Field(
        description="`stop`, or `length` where `max_tokens` cut the text off.", examples=["stop"]
    )
    seed: int | None = Field(description="The seed of the drawing; null where another server drew it.", examples=[42])


REWRITE_EXAMPLES: dict[str, Any] = {
    "template": {
        "summary": "By a rewriter template",
        "value": {"prompt": "A cat sleeping", "rewriter": "rewriter_character_generator"},
    },
    "all fields": {
        "summary": "Every field with a value",
        "value": {
            "prompt": "A cat sleeping",
            "rewriter": None,
            "custom_system_prompt": "Expand the prompt into two sentences.",
            "max_tokens": 512,
            "temperature": 1.0,
            "top_p": 0.95,
            "min_p": 0.0,
            "top_k": 0,
            "presence_penalty": 0.0,
            "seed": 42,
            "enable_thinking": False,
        },
    },
}
