"""Qwen3 as a text encoder: texts to tokens, tokens to the hidden states of one layer. Knows no queue and no HTTP.

The same weights can write, too: see `shared.language`.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import structlog
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer

from services.encoder.settings import EncoderSettings
from shared.checkpoint import checkpoint_dtype, require_parts
from shared.errors import InvalidField, Unready
from shared.fingerprint import fingerprint_of
from shared.language.model import LanguageModel, load_qwen3
from shared.tensors import CPU, dtype_of, loaded_bytes, pick_device, quantize, require_memory, within_memory

MEMORY_ADVICE = "free some of it, or choose another device with --text-encoder-device"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a caller may want to know: the model's name, width (length of a hidden state), depth, dtype and device;
    `fingerprint` is equal where equal texts give equal hidden states, but for a device's rounding."""

    name: str
    width: int
    layers: int
    dtype: str
    device: str
    fingerprint: str = ""


class TextEncoder:
    """The tokenizer and the language model of a Z-Image directory."""

    def __init__(
        self, model: Any, tokenizer: Tokenizer, facts: ModelFacts, language: LanguageModel | None = None
    ) -> None:
        self.facts = facts
        self._language = language
        self._model = model
        self._tokenizer = tokenizer
        self._first_layers = lru_cache(maxsize=None)(self._cut)

    @property
    def language(self) -> LanguageModel:
        """The same weights as a model that writes. Raises Unready for a checkpoint that has no head to write with."""
        if self._language is None:
            raise Unready("This text encoder cannot write: its checkpoint has no language model head.")
        return self._language

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; special tokens in the text are recognized, none are added. Safe in any thread."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def check_layer(self, layer: int) -> None:
        """Raises InvalidField unless the model is deep enough for hidden states `layer`."""
        if not -self.facts.layers <= layer <= -1:
            raise InvalidField(
                f"'hidden_layer' must be between -{self.facts.layers} and -1: the text encoder has "
                f"{self.facts.layers} layers."
            )

    @torch.inference_mode()
    def hidden_states(self, batch: Sequence[Sequence[int]], layer: int) -> list[torch.Tensor]:
        """Hidden states `layer` of each item, a CPU tensor [tokens, width] in the model's dtype.

        `layer` counts as in transformers' `hidden_states`: -1 after the final norm, -2 the input of the last layer.
        Items of unequal length are padded at the end, where under a causal mask no real token looks: an attention
        mask would change nothing but the speed. Layers above the one that is asked for are not run. Raises OutOfMemory.
        """
        return within_memory(torch.device(self.facts.device), partial(self._hidden_states, batch, layer), what="text")

    def _hidden_states(self, batch: Sequence[Sequence[int]], layer: int) -> list[torch.Tensor]:
        longest = max(len(ids) for ids in batch)
        padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch], device=self.facts.device)
        states = self._first_layers(layer)(input_ids=padded, use_cache=False).last_hidden_state
        return [item[: len(ids)].cpu().contiguous() for item, ids in zip(states, batch, strict=True)]

    def _cut(self, layer: int) -> Any:
        if layer == -1:
            return self._model
        cut = copy.copy(self._model)  # shares every weight; only the list of layers and the norm are its own
        cut._modules = dict(self._model._modules)
        cut.layers = self._model.layers[: self.facts.layers + 1 + layer]
        cut.norm = nn.Identity()
        return cut


def load_text_encoder(settings: EncoderSettings) -> TextEncoder:
    """Loads `text_encoder` and `tokenizer` of the model directory. Raises UnusableModel."""
    root = require_parts(settings.model_folder, *settings.parts)
    folder = root / "text_encoder"
    device = pick_device(settings.text_encoder_device)
    dtype = dtype_of(settings.text_encoder_dtype, checkpoint_dtype(folder), device)
    quantization = settings.text_encoder_quantization
    needed = loaded_bytes(folder, dtype, quantization)
    require_memory(device, needed, what=f"the text encoder of {root}", advice=MEMORY_ADVICE)
    model, writes = load_qwen3(folder, device=CPU, dtype=dtype)
    quantize(
        model.model,
        quantization,
        device,
        flag=f"encoder.quantization = {quantization}",
        wanted=lambda module, name: isinstance(module, nn.Linear) and name.startswith("layers."),
    )
    model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    facts = ModelFacts(
        name=_name(root),
        width=model.config.hidden_size,
        layers=model.config.num_hidden_layers,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        fingerprint=fingerprint_of([folder, root / "tokenizer"], f"{dtype} {quantization.value}"),
    )
    log.info("text encoder loaded", model_path=str(root), device=facts.device, dtype=facts.dtype, layers=facts.layers)
    language = LanguageModel(model, tokenizer, facts.name) if writes else None
    return TextEncoder(model.model, tokenizer.backend_tokenizer, facts, language)


def _name(root: Path) -> str:
    return root.resolve().name
