"""Qwen3's chat format as Z-Image reads it: system, user, optional think block, optional start of the answer.

Source: the chat template of the published Qwen3 tokenizer; with no system prompt and no thinking the result is what
`apply_chat_template(..., add_generation_prompt=True, enable_thinking=True)` gives. Knows nothing of templates or HTTP.
"""

from dataclasses import dataclass

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The four parts of a prompt. None and "" both leave a part out; white space is kept as it is given."""

    prompt: str
    system_prompt: str | None = None
    thinking_content: str | None = None
    assistant_content: str | None = None
    force_think_block: bool = False
    strip_quotes: bool = False

    @property
    def user_text(self) -> str:
        """The prompt as it goes into the conversation: without `"` where `strip_quotes` is set."""
        return self.prompt.replace('"', "") if self.strip_quotes else self.prompt


def format_prompt(conversation: Conversation) -> str:
    """The text that the encoder reads.

    A think block is written when there is thinking content, or when it is forced (then it may be empty); the answer is
    left open, so nothing closes the assistant's turn.
    """
    parts = []
    if conversation.system_prompt:
        parts.append(f"{IM_START}system\n{conversation.system_prompt}{IM_END}\n")
    parts.append(f"{IM_START}user\n{conversation.user_text}{IM_END}\n{IM_START}assistant\n")
    if conversation.thinking_content or conversation.force_think_block:
        parts.append(f"<think>\n{conversation.thinking_content or ''}\n</think>\n")
    if conversation.assistant_content:
        parts.append(conversation.assistant_content)
    return "".join(parts)
