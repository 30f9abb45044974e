"""One text about a picture, written token by token by the vision-language model's own head."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache

from shared.language.sampling import Sampler, draw


class Writing:
    """A text about a picture as far as it is read and written: keys and values of its tokens, and their positions."""

    def __init__(self, weights: Any, sampler: Sampler) -> None:
        self._weights, self._sampler = weights, sampler
        self._cache = DynamicCache(config=weights.config.text_config)
        self._deltas: Any = None

    def next_token(self, given: Mapping[str, torch.Tensor]) -> int:
        """Reads what is given, then draws a token, or `BROKEN`."""
        model = self._weights.model
        model.rope_deltas = self._deltas  # transformers keeps them on the model: extractions come in between
        output = model(**given, past_key_values=self._cache, use_cache=True)
        token = draw(self._weights.lm_head(output.last_hidden_state[:, -1]), [self._sampler])[0]
        self._deltas = model.rope_deltas
        return token
