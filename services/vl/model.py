"""Qwen3-VL: a picture and a text to hidden states, or to a text about it. Knows no queue and no HTTP.

The weights come and go; tokenizer, processor and configuration stay.
"""

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog
import torch
from PIL import Image
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from services.vl.patches import in_rows
from services.vl.tokens import Layout
from services.vl.writing import Writing
from shared.checkpoint import HEAD, UnusableModel, require_every_weight, weight_bytes
from shared.errors import InvalidField, NumericalError, OutOfMemory
from shared.language.options import Sampling
from shared.language.sampling import BROKEN, Sampler
from shared.language.text import TextStream
from shared.tensors import require_memory, within_memory

MEMORY_ADVICE = "free some of it, or choose another device with --vl-device"

T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a caller may want to know; `fingerprint` is equal where equal inputs give equal hidden states.

    `openings` are what the chat template begins an answer with, nothing or a think block, by `enable_thinking`.
    """

    name: str
    path: str
    width: int
    layers: int
    dtype: str
    device: str
    target_std: float
    fingerprint: str
    ends: frozenset[int]
    openings: Mapping[bool | None, str]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the model reads: token ids; patches float32 [patches, numbers]; the grid [1, 3] of time, rows, columns."""

    ids: Sequence[int]
    patches: torch.Tensor
    grid: torch.Tensor


class VisionModel:
    """A Qwen3-VL directory. What touches the weights belongs to the device's thread; `prepare` is safe in any."""

    def __init__(
        self,
        folder: Path,
        processor: Any,
        layout: Layout,
        facts: ModelFacts,
        dtype: torch.dtype,
        fingerprint: Callable[[], str],
    ) -> None:
        self.facts = facts
        self._fingerprint = fingerprint
        self._folder, self._processor, self._layout, self._dtype = folder, processor, layout, dtype
        self._device = torch.device(facts.device)
        self._weights: Any = None

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._weights is not None

    def check_layer(self, layer: int) -> None:
        """Raises InvalidField unless the model is deep enough for hidden states `layer`."""
        if not -self.facts.layers <= layer <= -1:
            raise InvalidField(
                f"'hidden_layer' must be between -{self.facts.layers} and -1: the vision-language model has "
                f"{self.facts.layers} layers."
            )

    def prepare(
        self, picture: Image.Image, text: str, system_prompt: str | None, *, opening: str = "", max_tokens: int
    ) -> Inputs:
        """Cuts an RGB picture into patches, scaled into the processor's pixel budget, and lays the tokens out.

        Raises InvalidField for more than `max_tokens` tokens.
        """
        read = self._processor(images=[picture], return_tensors="pt")
        grid = read["image_grid_thw"]
        count = int(grid.prod()) // self._processor.merge_size**2
        ids = self._layout.ids(count, text, system_prompt, opening=opening)
        if len(ids) > max_tokens:
            raise InvalidField(f"The picture and its text have {len(ids)} tokens, the limit is {max_tokens}.")
        return Inputs(ids, read["pixel_values"], grid)

    def require_room(self, needed: int | None = None) -> None:
        """Raises UnusableModel when the weights, `needed` bytes, do not fit on the device now, or cannot be read."""
        require_memory(
            self._device,
            weight_bytes(self._folder, self._dtype.itemsize) if needed is None else needed,
            what=f"the vision-language model of {self._folder}",
            advice=MEMORY_ADVICE,
        )

    def load(self) -> None:
        """Brings the weights to the device, if they are not there. Raises OutOfMemory, and UnusableModel for files that
        are not whole, or not those of the start, under whose fingerprint embeddings are kept."""
        if self.loaded:
            return
        if self._fingerprint() != self.facts.fingerprint:
            raise UnusableModel(f"the files in {self._folder} are not those that were there at the start")
        needed = weight_bytes(self._folder, self._dtype.itemsize)
        try:
            self.require_room(needed)
        except UnusableModel as error:  # memory that others hold now may be free later
            log.warning("the vision-language model does not fit", reason=str(error))
            raise OutOfMemory("There is too little free memory to load the vision-language model.") from None
        self._weights = self._in_memory(self._read_weights)
        log.info("vision-language model loaded", device=self.facts.device, dtype=self.facts.dtype)

    def _read_weights(self) -> Any:
        weights, loading = Qwen3VLForConditionalGeneration.from_pretrained(
            self._folder, dtype=self._dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        require_every_weight(self._folder, set(loading["missing_keys"]) - {HEAD})
        weights = weights.to(self._device).eval().requires_grad_(requires_grad=False)
        tower = weights.model.visual
        tower.patch_embed = in_rows(tower.patch_embed)
        return weights

    def unload(self) -> None:
        """Frees the weights."""
        if not self.loaded:
            return
        self._weights = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        log.info("vision-language model unloaded")

    @torch.inference_mode()
    def hidden_states(self, inputs: Inputs, layer: int, *, image_tokens_only: bool) -> torch.Tensor:
        """Hidden states `layer`, a CPU tensor [tokens, width] in the model's dtype; bit for bit what transformers'
        own forward gives for one picture. Layers above the one that is asked for are not run. Loads the weights.
        Raises OutOfMemory."""
        self.load()
        return self._in_memory(partial(self._hidden_states, inputs, layer, image_tokens_only=image_tokens_only))

    def _hidden_states(self, inputs: Inputs, layer: int, *, image_tokens_only: bool) -> torch.Tensor:
        given = self._given(inputs)
        model, last = _cut(self._weights.model, self.facts.layers + 1 + layer)
        seen: list[torch.Tensor] = []
        hook = last.register_forward_hook(lambda _module, _args, output: seen.append(output))
        try:
            model(**given, use_cache=False)
        finally:
            hook.remove()
        states = seen[0][0]
        if image_tokens_only:
            states = states[given["mm_token_type_ids"][0].bool()]
        return states.cpu().contiguous()

    @torch.inference_mode()
    def write(self, inputs: Inputs, sampling: Sampling) -> Iterator[int]:
        """The tokens of a text about the picture, without an end. Loads the weights.

        Raises OutOfMemory, and NumericalError where the scores are not numbers.
        """
        self.load()
        writing = Writing(self._weights, Sampler(sampling))
        given = self._in_memory(partial(self._given, inputs))
        while True:
            token = self._in_memory(partial(writing.next_token, given))
            if token == BROKEN:
                raise NumericalError("The vision-language model's scores are not numbers.")
            given = {"input_ids": torch.tensor([[token]], device=self._device)}
            yield token

    def text_stream(self) -> TextStream:
        """Turns the tokens of one text into characters."""
        return TextStream(self._layout.tokenizer)

    def _given(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        ids = torch.tensor([inputs.ids], device=self._device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self._layout.image).int(),
            "pixel_values": inputs.patches.to(self._device),
            "image_grid_thw": inputs.grid.to(self._device),
        }

    def _in_memory(self, work: Callable[[], T]) -> T:
        return within_memory(self._device, work, what="picture")


def _cut(model: Any, layers: int) -> tuple[Any, nn.Module]:
    """A `Qwen3VLModel` that stops after so many layers of its language half, and the module whose output is wanted:
    the last of them, or of all the norm. Every weight is shared.

    Visual features are added to the output of the first layers, after what `hidden_states` has of them.
    """
    language = model.language_model
    if layers == len(language.layers):
        return model, language.norm
    cut, short = copy.copy(model), copy.copy(language)
    cut._modules, short._modules = dict(model._modules), dict(language._modules)
    cut.language_model = short
    short.layers, short.norm = language.layers[:layers], nn.Identity()
    return cut, short.layers[-1]
