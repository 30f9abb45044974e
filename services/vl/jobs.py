"""The two kinds of work on a vision-language model: extracting hidden states, and writing about a picture."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from services.vl.model import Inputs, VisionModel
from services.vl.scaling import scale
from shared.jobs import Job
from shared.language.options import FinishReason, Sampling
from shared.language.text import TextStream
from shared.schemas.vl import ExtractParameters

MAX_TOKENS = 512  # of a description that names no number


@dataclass(frozen=True, slots=True)
class Extraction:
    """Hidden states, a CPU tensor [tokens, width] in the model's dtype, and their standard deviation."""

    states: Any
    original_std: float
    scaled_std: float


@dataclass(frozen=True, slots=True)
class Description:
    """A text about a picture, why it ended, and the seed of its drawing."""

    text: str
    reason: FinishReason
    seed: int


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


class DescribeJob(Job[Description]):
    """A picture that waits for a text about it, or has a part of it."""

    def __init__(self, inputs: Inputs, max_tokens: int | None, sampling: Sampling) -> None:
        super().__init__()
        self.inputs = inputs
        self.ended = False
        self._max_tokens = max_tokens or MAX_TOKENS
        self._sampling = sampling
        self._begun: tuple[Iterator[int], TextStream] | None = None
        self._written = 0
        self._text = ""

    def advance(self, model: VisionModel) -> None:
        """Writes a token, and ends after the last. Raises what the model raises; the job has ended then too."""
        self._begun = self._begun or (model.write(self.inputs, self._sampling), model.text_stream())
        tokens, stream = self._begun
        self.ended = True  # unless the next token comes and is not the last
        token = next(tokens)
        self._written += 1
        if token in model.facts.ends:
            self._finish(stream, "stop")
            return
        self._text += stream.add(token)
        if self._written >= self._max_tokens:
            self._finish(stream, "length")
            return
        self.ended = False

    def _finish(self, stream: TextStream, reason: FinishReason) -> None:
        self.resolve(Description(self._text + stream.end(), reason, self._sampling.seed))
