"""The texts that are being written: each step of the model adds a token to every one of them."""

from collections.abc import Sequence
from typing import Any

import torch

from shared.errors import OutOfMemory
from shared.language.cache import RowCache
from shared.language.options import Wanted
from shared.language.sampling import BROKEN, Sampler, draw
from shared.tensors import within_memory

PROMPT_TOKENS = {"cpu": 64}
MANY_PROMPT_TOKENS = 512
"""Tokens of a prompt that are read in one piece: about as long as a step takes, so that nobody waits for longer."""


class Row:
    """A text in the making: `read` of its prompt's tokens and all but the last of its `tokens` are in the cache."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.sampler = Sampler(wanted.sampling)
        self.read = 0
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        """Slots that it fills."""
        return self.read + max(0, len(self.tokens) - 1)


class Batch:
    """Runs many texts through a causal language model together.

    A text's prompt is read alone, in pieces; then the text takes part in steps that give each one token. Texts come
    and go between two pieces of work. Rows in use are the first ones of the cache; a prompt that is being read is last.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        config = model.config
        self._device = model.device
        self._piece = PROMPT_TOKENS.get(self._device.type, MANY_PROMPT_TOKENS)
        self._rows: list[Row] = []
        self._reading: Row | None = None
        self._read_last = False
        self._cache = RowCache(
            layers=config.num_hidden_layers,
            heads=config.num_key_value_heads,
            width=config.head_dim,
            dtype=model.dtype,
            device=self._device,
        )

    @property
    def can_join(self) -> bool:
        """Whether another text may come: one prompt is read at a time."""
        return self._reading is None

    def join(self, row: Row) -> None:
        """Takes a text in."""
        self._reading = row

    @torch.inference_mode()
    def leave(self, row: Row) -> None:
        """Lets a text go; the memory goes with the last one."""
        if row is self._reading:
            self._reading = None
        elif row in self._rows:
            self._close_gap(self._rows.index(row))
        if not self._rows and self._reading is None:
            self._cache.clear()

    @torch.inference_mode()
    def advance(self) -> list[tuple[Row, int]]:
        """One piece of work, a piece of a prompt or a step, in turns; answers the tokens that it brought.

        A token is `BROKEN` where the model's scores are not numbers. Raises OutOfMemory; the batch is empty then.
        """
        try:
            return within_memory(self._device, self._advance, what="text")
        except OutOfMemory:
            self.clear()
            raise

    def clear(self) -> None:
        """Lets every text go."""
        self._rows, self._reading = [], None
        self._cache.clear()

    def _advance(self) -> list[tuple[Row, int]]:
        if self._reading is not None and (not self._rows or not self._read_last):
            self._read_last = True
            return self._read(self._reading)
        self._read_last = False
        return self._step() if self._rows else []

    def _read(self, row: Row) -> list[tuple[Row, int]]:
        start = row.read
        ids = row.wanted.ids[start : start + self._piece]
        self._reserve([*self._rows, row], start + len(ids))
        self._cache.write_to_row(len(self._rows), start)
        positions = torch.arange(start, start + len(ids), device=self._device)
        mask = None  # a prompt's first piece: attention is causal by itself
        if start:
            mask = (torch.arange(start + len(ids), device=self._device) <= positions.unsqueeze(1))[None, None]
        states = self._forward(torch.tensor([ids], device=self._device), positions.unsqueeze(0), mask)
        row.read += len(ids)
        if row.read < len(row.wanted.ids):
            return []
        self._reading = None
        self._rows.append(row)
        return self._draw(states[:, -1], [row])

    def _step(self) -> list[tuple[Row, int]]:
        lengths = [row.length for row in self._rows]
        self._reserve(self._rows if self._reading is None else [*self._rows, self._reading], max(lengths) + 1)
        ends = self._cache.write_to_ends(lengths)
        mask = None  # texts of one length see the same slots: all
        if min(lengths) < max(lengths):
            mask = (torch.arange(max(lengths) + 1, device=self._device) <= ends.unsqueeze(1))[:, None, None]
        last = torch.tensor([[row.tokens[-1]] for row in self._rows], device=self._device)
        return self._draw(self._forward(last, ends.unsqueeze(1), mask)[:, -1], self._rows)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        states: torch.Tensor = self._model.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask={"full_attention": mask},
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return states

    def _draw(self, states: torch.Tensor, rows: Sequence[Row]) -> list[tuple[Row, int]]:
        tokens = draw(self._model.lm_head(states), [row.sampler for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
            if token == BROKEN:
                self._cache.wipe(self._rows.index(row))
        return list(zip(rows, tokens, strict=True))

    def _reserve(self, rows: Sequence[Row], slots: int) -> None:
        self._cache.reserve(len(rows), slots, limit=max(row.wanted.room for row in rows))

    def _close_gap(self, gap: int) -> None:
        """Moves the last text, and a prompt that is being read behind it, so that rows in use stay together."""
        last = len(self._rows) - 1
        if gap != last:
            self._cache.move(last, gap, self._rows[last].length)
            self._rows[gap] = self._rows[last]
        self._rows.pop()
        if self._reading is not None and self._reading.read:
            self._cache.move(last + 1, last, self._reading.read)
