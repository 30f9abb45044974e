"""The two kinds of work on a vision-language model: extracting hidden states, and writing about a picture."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from services.vl.model import Inputs, VisionModel
from services.vl.scaling import scale
from shared.jobs import Job, TextJob
from shared.language.options import Ending, FinishReason, Sampling
from shared.language.text import TextStream
from shared.schemas.vl import ExtractParameters


@dataclass(frozen=True, slots=True)
class Extraction:
    """Hidden states, a CPU tensor [tokens, width] in the model's dtype, and their standard deviation."""

    states: Any
    original_std: float
    scaled_std: float


class ExtractJob(Job[Extraction]):
    """A picture that waits for its hidden states."""

    def __init__(self, inputs: Inputs, parameters: ExtractParameters) -> None:
        super().__init__()
        self.inputs = inputs
        self.parameters = parameters

    def run(self, model: VisionModel) -> None:
        """Extracts, scales and ends. Raises what the model raises."""
        wanted = self.parameters
        states = model.hidden_states(self.inputs, wanted.hidden_layer, image_tokens_only=wanted.image_tokens_only)
        scaled = scale(states, model.facts.target_std if wanted.scale_to_text else None)
        self.resolve(Extraction(scaled.states, scaled.original_std, scaled.scaled_std))


class DescribeJob(TextJob[Ending]):
    """A picture that waits for a text about it, or has a part of it; the result is how the text ended."""

    def __init__(self, inputs: Inputs, max_tokens: int, sampling: Sampling) -> None:
        super().__init__()
        self.inputs = inputs
        self.ended = False
        self._max_tokens = max_tokens
        self._sampling = sampling
        self._begun: tuple[Iterator[int], TextStream] | None = None
        self._written = 0

    def advance(self, model: VisionModel) -> None:
        """Writes a token, and ends after the last. Raises what the model raises; the job has ended then too."""
        self._begun = self._begun or (model.write(self.inputs, self._sampling), model.text_stream())
        tokens, stream = self._begun
        self.ended, self._begun = True, None  # unless the next token comes and is not the last
        token = next(tokens)
        self._written += 1
        if token in model.facts.ends:
            self._finish(stream, "stop")
            return
        self.emit(stream.add(token))
        if self._written >= self._max_tokens:
            self._finish(stream, "length")
            return
        self.ended, self._begun = False, (tokens, stream)

    def _finish(self, stream: TextStream, reason: FinishReason) -> None:
        self.emit(stream.end())
        self.resolve(Ending(reason, len(self.inputs.ids), self._written))
