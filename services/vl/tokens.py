"""The tokens of a picture with a text, laid out as Qwen3-VL's processor documents it. Imports no torch."""

from tokenizers import Tokenizer

from shared.chat import IM_END, IM_START, Conversation, format_prompt

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
ENDS = (IM_END, "<|endoftext|>")
"""Tokens after which the model says no more."""
ASSISTANT = f"{IM_START}assistant\n"
"""What opens the assistant's turn."""
_PICTURE, _TEXT, _SYSTEM = "\ue000", "\ue001", "\ue002"  # stand where the parts go, in the chat format's own text


class Layout:
    """Qwen3's chat format around `<|vision_start|>`, as many `<|image_pad|>` as the picture has, `<|vision_end|>`."""

    def __init__(self, tokenizer: Tokenizer, image: int) -> None:
        self.tokenizer = tokenizer
        self.image = image
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True  # in a client's text `<|image_pad|>` is text

    def ids(self, image_tokens: int, text: str, system_prompt: str | None = None, *, opening: str = "") -> list[int]:
        """Token ids of a user's turn that holds the picture and then the text, the assistant's turn opened.

        `system_prompt` None leaves that turn out; `opening` is what the assistant's turn begins with.
        """
        conversation = Conversation(
            prompt=f"{_PICTURE}{_TEXT}", system_prompt=None if system_prompt is None else _SYSTEM
        )
        head, tail = format_prompt(conversation).split(_PICTURE)
        picture = [*self._marks(VISION_START), *[self.image] * image_tokens, *self._marks(VISION_END)]
        end = self._marks(tail.removeprefix(_TEXT) + opening)
        return [*self._head(head, system_prompt), *picture, *self._text(text), *end]

    def _head(self, head: str, system_prompt: str | None) -> list[int]:
        before, found, after = head.partition(_SYSTEM)
        if not found or system_prompt is None:
            return self._marks(head)
        # The first marks end with a line break, which a tokenizer may join with what follows: text that is plain.
        return [*self._marks(before), *self._text(system_prompt), *self._marks(after)]

    def _marks(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _text(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids
