"""The public API's requests for pictures and encoded prompts, and the answers to them that are JSON.

A field that is left out (or null) takes the server's default, which flags may change.
"""

from typing import Any

from pydantic import BaseModel, Field

from shared.chat import Conversation
from shared.schemas.diffusion import Done, Loras
from shared.schemas.fields import (
    CfgNormalization,
    CfgTruncation,
    GuidanceScale,
    HiddenLayer,
    LongPromptMode,
    Name,
    NumImages,
    PreviewEvery,
    Priority,
    Prompt,
    RequestModel,
    Seed,
    Shift,
    Side,
    Steps,
    Text,
    TimeoutS,
)
from shared.schemas.rewriter import RewriteChoice


class PromptRequest(RequestModel):
    """A prompt and what surrounds it in the conversation that the encoder reads."""

    prompt: Prompt = Field(description="User message / description of the picture.", examples=["A cat sleeping"])
    system_prompt: Text | None = Field(None, description="System message.", examples=["You are a painter."])
    thinking_content: Text | None = Field(
        None,
        description="Content inside `<think>...</think>`; adds the think block.",
        examples=["Orange fur, green eyes."],
    )
    assistant_content: Text | None = Field(None, description="Content after `</think>`.", examples=[""])
    force_think_block: bool = Field(default=False, description="Add a think block even without content.")
    strip_quotes: bool = Field(default=False, description='Remove `"` from the prompt (for JSON inputs).')
    template: Name | None = Field(
        None, description="Name of a template; explicit fields win over it.", examples=["photorealistic"]
    )

    def conversation(self) -> Conversation:
        """The parts of the prompt as they were given, before any template."""
        return Conversation(
            prompt=self.prompt,
            system_prompt=self.system_prompt,
            thinking_content=self.thinking_content,
            assistant_content=self.assistant_content,
            force_think_block=self.force_think_block,
            strip_quotes=self.strip_quotes,
        )


class EncodeRequest(PromptRequest):
    """`POST /api/encode`."""

    hidden_layer: HiddenLayer | None = Field(
        None, description="Hidden layer to read (-1 the last, -2 the one before). Default -2.", examples=[-2]
    )


class GenerateRequest(EncodeRequest):
    """`POST /api/generate`."""

    width: Side | None = Field(None, description="Width in pixels, a multiple of 16. Default 1024.", examples=[1024])
    height: Side | None = Field(None, description="Height in pixels, a multiple of 16. Default 1024.", examples=[1024])
    steps: Steps | None = Field(None, description="Denoising steps. Default 9.", examples=[9])
    seed: Seed | None = Field(None, description="Seed of the noise; null draws one.", examples=[42])
    guidance_scale: GuidanceScale | None = Field(
        None, description="Guidance scale; 0 is off and best for Z-Image Turbo. Default 0.", examples=[0.0]
    )
    shift: Shift | None = Field(None, description="Shift of the noise schedule. Default 3.", examples=[3.0])
    long_prompt_mode: LongPromptMode | None = Field(
        None,
        strict=False,
        description="How a prompt beyond the text limit is fitted. Default interpolate.",
        examples=["interpolate"],
    )
    rewrite: RewriteChoice | None = Field(
        None, description="Rewrite the prompt first, as /api/rewrite does, and draw what comes of it.", examples=[None]
    )
    negative_prompt: Text | None = Field(
        None, description="What guidance steers away from; without guidance it has no effect.", examples=["blurry"]
    )
    cfg_normalization: CfgNormalization | None = Field(
        None,
        description="Guidance makes a step at most so many times as long; 0 is off, true is 1. Default 0.",
    )
    cfg_truncation: CfgTruncation | None = Field(
        None, description="The share of the way after which there is no guidance. Default 1.", examples=[1.0]
    )
    num_images: NumImages | None = Field(
        None, description="Pictures to draw, their seeds counting up. Default 1.", examples=[1]
    )
    loras: Loras | None = Field(
        None,
        description="LoRAs of the server's folder, instead of those that pictures have by default.",
        examples=[None],
    )
    priority: Priority | None = Field(
        None, strict=False, description="Which waiting pictures are begun first. Default normal.", examples=["normal"]
    )
    timeout_s: TimeoutS | None = Field(
        None, description="Seconds after which the picture is given up. Default, and at most, the server's own."
    )
    preview_every: PreviewEvery | None = Field(
        None, description="Steps between two previews in a stream of events; 0 is none. Default 3.", examples=[3]
    )


class SeveralPictures(BaseModel):
    """The pictures of one request as JSON, in the order of their seeds."""

    images: list[Done]


class EncodeAnswer(BaseModel):
    """`POST /api/encode`."""

    shape: list[int] = Field(description="Tokens, and length of each hidden state.", examples=[[10, 2560]])
    dtype: str = Field(examples=["torch.bfloat16"])
    encode_time: float = Field(description="Seconds.", examples=[0.123])
    token_count: int = Field(examples=[10])
    prompt: str = Field(examples=["A cat sleeping"])
    formatted_prompt: str = Field(
        examples=["<|im_start|>user\nA cat sleeping<|im_end|>\n<|im_start|>assistant\n"],
    )


class SaveAnswer(BaseModel):
    """`POST /api/save-embeddings`."""

    path: str = Field(
        description="The file, on the gateway's machine.",
        examples=["/data/embeddings/embeddings_3f1c0a5b7d2e.safetensors"],
    )
    shape: list[int] = Field(examples=[[10, 2560]])
    encode_time: float = Field(description="Seconds.", examples=[0.123])


class FormatAnswer(BaseModel):
    """`POST /api/format-prompt`: the text as the encoder reads it, its size, and the request again."""

    formatted_prompt: str = Field(examples=["<|im_start|>user\nPaint a cat<|im_end|>\n<|im_start|>assistant\n"])
    char_count: int = Field(examples=[63])
    token_count: int = Field(examples=[11])
    prompt: str = Field(examples=["Paint a cat"])
    system_prompt: str | None
    thinking_content: str | None
    assistant_content: str | None
    template: str | None
    force_think_block: bool
    strip_quotes: bool


class TemplateEntry(BaseModel):
    """One template for pictures."""

    name: str = Field(examples=["photorealistic"])
    has_thinking: bool
    description: str
    category: str


class TemplateList(BaseModel):
    """`GET /api/templates`."""

    templates: list[TemplateEntry]


class RewriterEntry(BaseModel):
    """One template for the rewriter."""

    name: str = Field(examples=["rewriter_scene_enhancer"])
    description: str = Field(examples=["Scene Enhancer (prompt rewriter)"])


class RewriterList(BaseModel):
    """`GET /api/rewriters`."""

    rewriters: list[RewriterEntry]


GENERATE_EXAMPLES: dict[str, Any] = {
    "shortest": {"summary": "A prompt and nothing else", "value": {"prompt": "A cat sleeping"}},
    "rewritten": {
        "summary": "A prompt that is made longer first",
        "value": {"prompt": "A cat sleeping", "rewrite": {"rewriter": "rewriter_scene_enhancer"}},
    },
    "all fields": {
        "summary": "Every field with a value",
        "value": {
            "prompt": "A cat sleeping",
            "system_prompt": "You are a painter.",
            "thinking_content": "Orange fur, green eyes.",
            "assistant_content": "",
            "force_think_block": False,
            "strip_quotes": False,
            "template": None,
            "width": 1024,
            "height": 1024,
            "steps": 9,
            "seed": 42,
            "guidance_scale": 0.0,
            "shift": 3.0,
            "long_prompt_mode": "interpolate",
            "hidden_layer": -2,
        },
    },
}
PROMPT_EXAMPLES: dict[str, Any] = {
    "shortest": {"summary": "A prompt and nothing else", "value": {"prompt": "A cat sleeping"}},
    "thinking": {
        "summary": "System prompt and thinking",
        "value": {
            "prompt": "Paint a cat",
            "system_prompt": "You are a painter.",
            "thinking_content": "Orange fur.",
        },
    },
}
