"""Qwen3 as a causal language model: loads it, and turns conversations into tokens. Knows no queue and no HTTP."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import Qwen3ForCausalLM

from shared.chat import IM_END
from shared.checkpoint import HEAD, UnusableModel, read_json, require_every_weight, require_weights
from shared.errors import InvalidField, Unready
from shared.language.batch import Batch
from shared.language.options import Message, Prompt
from shared.language.text import TextStream
from shared.language.thinking import OPEN

_ENDS = (IM_END, "<|endoftext|>")
"""Tokens after which Qwen3 says no more, whatever its generation config names beside them."""


@dataclass(frozen=True, slots=True)
class LanguageFacts:
    """The model's name, how many tokens it can hold, and the tokens that end a text; where and in which numbers it
    computes; a fingerprint of its files."""

    name: str
    context: int
    ends: frozenset[int]
    device: str
    dtype: str
    fingerprint: str


class LanguageModel:
    """A causal language model with its tokenizer, and the texts that it is writing."""

    def __init__(self, model: Any, tokenizer: Any, name: str, fingerprint: str = "") -> None:
        self._tokenizer = tokenizer
        self.batch = Batch(model)
        self.facts = LanguageFacts(
            name,
            model.config.max_position_embeddings,
            _ends(model, tokenizer),
            str(model.device),
            str(model.dtype).removeprefix("torch."),
            fingerprint,
        )

    def prompt(self, messages: Sequence[Message], *, enable_thinking: bool | None = None) -> Prompt:
        """A conversation in the tokenizer's chat format, the assistant's turn opened. Safe in any thread.

        `enable_thinking` None leaves it to the template. Raises InvalidField, and Unready where there is no template.
        """
        if not self._tokenizer.chat_template:
            raise Unready("The tokenizer of this model has no chat template, so it cannot take part in a conversation.")
        options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        try:
            text = self._tokenizer.apply_chat_template(
                [asdict(message) for message in messages], tokenize=False, add_generation_prompt=True, **options
            )
        except TemplateError:
            raise InvalidField("'messages' do not fit the model's chat template.") from None
        ids = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return Prompt(ids, opens_thinking=text.rstrip().endswith(OPEN))

    def text_stream(self, stop: Sequence[str]) -> TextStream:
        """Turns the tokens of one text into characters."""
        return TextStream(self._tokenizer.backend_tokenizer, stop)


def load_qwen3(folder: Path, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, bool]:
    """A `Qwen3ForCausalLM` from a folder of weights, and whether the folder has a head to write with.

    A head that is tied to the embeddings takes no memory. Raises UnusableModel.
    """
    require_weights(folder)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "qwen3":
        raise UnusableModel(f"{folder} is not a Qwen3 language model, but of the type {config.get('model_type')!r}")
    model, loading = Qwen3ForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    missing = set(loading["missing_keys"])
    require_every_weight(folder, missing - {HEAD})
    if set(model.config.layer_types) != {"full_attention"}:
        raise UnusableModel(f"{folder} has layers of another kind than full attention, which this server cannot run")
    return model.to(device).eval().requires_grad_(requires_grad=False), HEAD not in missing


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    named = model.generation_config.eos_token_id
    ends: Iterable[int | None] = named if isinstance(named, list) else [named]
    vocabulary = tokenizer.get_added_vocab()
    known = [vocabulary.get(token) for token in _ENDS]
    return frozenset(token for token in (*ends, tokenizer.eos_token_id, *known) if token is not None)
