"""What the public API tells of pictures that were kept."""

from typing import Any

from pydantic import BaseModel, Field

from shared.schemas.diffusion import Loras
from shared.schemas.fields import BlendMode, LongPromptMode, OutlierMasking


class HistoryEntry(BaseModel):
    """One picture of the history: the request that makes it again, when it was made and how long that took."""

    id: int
    timestamp: float = Field(description="Seconds since 1970.", examples=[1733285000.0])
    prompt: str = Field(description="The prompt that was drawn.")
    original_prompt: str | None = Field(default=None, description="The prompt before it was rewritten.")
    rewriter: str | None = Field(default=None, description="The rewriter template that was named.")
    system_prompt: str | None
    thinking_content: str | None
    assistant_content: str | None
    force_think_block: bool
    strip_quotes: bool
    width: int
    height: int
    steps: int
    seed: int = Field(description="The seed that was used, also when it was drawn.")
    template: str | None
    guidance_scale: float
    shift: float
    long_prompt_mode: LongPromptMode
    hidden_layer: int
    negative_prompt: str | None = None
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    loras: Loras | None = None
    vl_embeddings_id: str | None = Field(default=None, description="The reference picture's, with vision conditioning.")
    vl_references: list[dict[str, Any]] | None = Field(default=None, description="Of several references.")
    vl_alpha: float | None = None
    vl_hidden_layer: int | None = None
    vl_image_tokens_only: bool | None = None
    vl_text: str | None = None
    vl_blend_mode: BlendMode | None = None
    vl_outlier_masking: OutlierMasking | None = None
    vl_style_share: float | None = None
    gen_time: float = Field(description="Seconds.", examples=[12.5])
    image_b64: str | None = Field(default=None, description="The PNG, with images=full.")
    thumb_b64: str | None = Field(default=None, description="A small JPEG, with images=thumb.")


class HistoryAnswer(BaseModel):
    """`GET /api/history`: oldest first."""

    history: list[HistoryEntry]


class DeletedAnswer(BaseModel):
    """`DELETE /api/history/{index}`."""

    deleted: HistoryEntry
    remaining: int = Field(examples=[4])


class ClearedAnswer(BaseModel):
    """`DELETE /api/history`."""

    cleared: int = Field(examples=[5])
