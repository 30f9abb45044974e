"""Tokens to text, a piece at a time: what is certain goes out, what may still change is held back. No torch here."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from shared.language.marks import held_back


class TextStream:
    """The text of one generation. Special tokens are left out; it ends before the first of the stop strings."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now; half a character, or what may become a stop string, is not."""
        self._held += self._decoder.step(self._tokenizer, token) or ""
        found = [place for mark in self._stop if (place := self._held.find(mark)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - held_back(self._held, self._stop))

    def end(self) -> str:
        """What was held back, once no token comes any more; nothing after a stop string."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text
