"""Keys and values of rows that join and leave: transformers' cache, of rows of unequal length.

All rows end at the same column, so that a step appends one column for all of them, and what is left
of a row's start is masked, as in a batch that is padded on the left. Positions between tokens of a
row are their distances in columns, which is what masks of sliding windows go by. Memory is taken
for twice what is used, so that a step copies nothing, and a row that joins or leaves alone.

Nothing counts until `advance`: a step that fails halfway leaves the rows as they were.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformers import Cache

_LEAST = 64
"""Columns that memory is taken for at first."""


class RowCache(DynamicCache):  # type: ignore[misc]
    """Keys and values `(rows, heads, columns, size)` of each layer.

    Attributes:
        starts: the column at which each row starts.
        end: the column that comes next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[_RowLayer] = []
        self.starts: list[int] = []
        self.end = 0
        self._rows = self._columns = 0  # that there is memory for

    @property
    def start(self) -> int:
        """The first column that a row uses."""
        return min(self.starts, default=self.end)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are taken."""
        return sum(memory.nbytes for layer in self.layers for memory in layer.memory)

    def join(self, filled: "Cache", lengths: Sequence[int]) -> None:
        """Take new rows after those that there are.

        Args:
            filled: their cache, of full length in every layer, padded on the left.
            lengths: how many tokens each has.
        """
        width, before = max(lengths), len(self.starts)
        rows, live = before + len(lengths), self.end - self.start
        self.layers += [_RowLayer(self) for _ in filled.layers[len(self.layers) :]]
        if rows > self._rows or self.end < width:
            end = max(live, width)
            self._lay_out(max(rows, 2 * before), max(_LEAST, 2 * end), end)
        place = slice(self.end - width, self.end)
        for layer, other in zip(self.layers, filled.layers, strict=True):
            if other.keys is not None and other.keys.numel():
                layer.write(slice(before, rows), place, (other.keys, other.values))
        self.starts += [self.end - length for length in lengths]

    def arrange(self, order: Sequence[int]) -> None:
        """Put rows in another order, and drop those that are not in it.

        Args:
            order: the place that each row has now.
        """
        moved = [place for place, row in enumerate(order) if place != row]
        if moved:
            columns, old = slice(self.start, self.end), [order[place] for place in moved]
            for layer in self.layers:
                for memory in layer.memory:
                    memory[moved, :, columns] = memory[old, :, columns]
        self.starts = [self.starts[row] for row in order]

    def prepare(self, device: torch.device) -> Tensor:
        """Have room for a step.

        Returns:
            what it looks at: int64 `(rows, columns)`, its own column included.
        """
        if self.end == self._columns:
            live = self.end - self.start
            self._lay_out(self._rows, max(_LEAST, 2 * live), live)
        starts = torch.tensor(self.starts, device=device).unsqueeze(1)
        return (torch.arange(self.start, self.end + 1, device=device) >= starts).long()

    def advance(self) -> None:
        """The step went well: its column counts."""
        self.end += 1

    def part(self, rows: Sequence[int]) -> "RowCache":
        """Some of the rows, copied to a cache of their own."""
        found = RowCache()
        found.starts, found.end = [self.starts[row] for row in rows], self.end
        found._rows, found._columns = len(rows), self._columns
        for layer in self.layers:
            own = _RowLayer(found)
            own.memory = tuple(memory[list(rows)] for memory in layer.memory)
            found.layers.append(own)
        return found

    def _lay_out(self, rows: int, columns: int, end: int) -> None:
        """Take other memory, in which the rows end at a column."""
        used, moved = slice(self.start, self.end), end - self.end
        for layer in self.layers:
            layer.lay_out(rows, columns, used, slice(used.start + moved, end))
        self.starts = [start + moved for start in self.starts]
        self.end, self._rows, self._columns = end, rows, columns


class _RowLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's.

    Attributes:
        memory: keys and values; empty of a layer that uses another's, and before any row joined.
    """

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self._cache = cache
        self.memory: tuple[Tensor, ...] = ()

    def lay_out(self, rows: int, columns: int, used: slice, place: slice) -> None:
        """Take other memory, with the rows' columns elsewhere; the rest is 0, which masks need."""
        count, old = len(self._cache.starts), self.memory
        self.memory = tuple(m.new_zeros(rows, m.shape[1], columns, m.shape[3]) for m in old)
        for fresh, memory in zip(self.memory, old, strict=True):
            fresh[:count, :, place] = memory[:count, :, used]

    def write(self, rows: slice, columns: slice, new: tuple[Tensor, Tensor]) -> None:
        """New rows' keys and values."""
        if not self.memory:
            room = (self._cache._rows, self._cache._columns)
            self.memory = tuple(
                each.new_zeros(room[0], each.shape[1], room[1], each.shape[3]) for each in new
            )
        for memory, each in zip(self.memory, new, strict=True):
            memory[rows, :, columns] = each

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """A step's keys and values `(rows, heads, 1, size)` → all that it looks at."""
        start, end, count = self._cache.start, self._cache.end, len(self._cache.starts)
        keys, values = self.memory
        keys[:count, :, end] = key_states[:, :, 0]
        values[:count, :, end] = value_states[:, :, 0]
        return keys[:count, :, start : end + 1], values[:count, :, start : end + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a step looks at, and where they start."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """How many columns are used."""
        return self._cache.end - self._cache.start
