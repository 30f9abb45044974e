"""Keys and values of several texts of unequal length, a row each. A pure leaf: tensors in, tensors out."""

from collections.abc import Iterator, Sequence

import torch

STEP = 256  # slots by which rows grow at least: growing copies every row


class RowCache:
    """What transformers' attention layers write to and read from, through `update`.

    A layer's keys, and its values, are one tensor [rows, heads, slots, width]. A text of n tokens fills the first n
    slots of its row. Slots that no text has filled hold finite numbers; the caller's mask keeps them unread.
    """

    def __init__(self, *, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = heads, width
        self._dtype, self._device = dtype, device
        self._layers = layers
        self._row: int | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets every row and gives the memory back."""
        self.rows = self.slots = 0
        self._keys = self._values = [self._empty(0, 0)] * self._layers

    def reserve(self, rows: int, slots: int, *, limit: int) -> None:
        """Makes room for `rows` rows of `slots` slots; slots beyond `limit` will never be asked for."""
        if rows <= self.rows and slots <= self.slots:
            return
        wanted = max(slots, min(limit, self.slots if slots <= self.slots else 2 * self.slots))
        wanted = -(-wanted // STEP) * STEP
        self._keys = [self._copied(old, rows, wanted) for old in self._keys]
        self._values = [self._copied(old, rows, wanted) for old in self._values]
        self.rows, self.slots = rows, wanted

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` slots of one row over another row's."""
        for tensor in self._tensors():
            tensor[target, :, :length] = tensor[source, :, :length]

    def wipe(self, row: int) -> None:
        """Clears a row that may hold numbers which are none: even unread they would spoil a sum."""
        for tensor in self._tensors():
            tensor[row].zero_()

    def write_to_row(self, row: int, start: int) -> None:
        """The next forward reads one text, whose first `start` tokens are in this row already."""
        self._row, self._start = row, start

    def write_to_ends(self, lengths: Sequence[int]) -> torch.Tensor:
        """The next forward reads one token of each of the first rows, which hold so many; answers `lengths` [rows]."""
        self._row = None
        self._longest = max(lengths) + 1
        self._places = torch.arange(len(lengths), device=self._device)
        self._ends = torch.tensor(lengths, device=self._device)
        return self._ends

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps what a layer made of the new tokens [rows, heads, tokens, width]; answers all that these rows hold."""
        return self._write(self._keys[layer], keys), self._write(self._values[layer], values)

    def _write(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self._row is None:
            kept[self._places, :, self._ends] = new[:, :, 0]
            return kept[: len(new), :, : self._longest]
        end = self._start + new.shape[2]
        kept[self._row, :, self._start : end] = new[0]
        return kept[self._row : self._row + 1, :, :end]

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self._keys
        yield from self._values

    def _empty(self, rows: int, slots: int) -> torch.Tensor:
        heads, width = self._shape
        return torch.zeros(
            rows, heads, slots, width, dtype=self._dtype, device=self._device
        )  # not `empty`: that may hold what is no number

    def _copied(self, old: torch.Tensor, rows: int, slots: int) -> torch.Tensor:
        new = self._empty(rows, slots)
        rows, slots = min(rows, old.shape[0]), min(slots, old.shape[2])
        new[:rows, :, :slots] = old[:rows, :, :slots]
        return new
