"""Exact top-k by magnitude, over one tensor or over the whole model; nothing is sorted.

The bits of a non-negative float32, read as an integer, are ordered like the floats. The whole
model's k-th largest magnitude is therefore found exactly by two histograms, of the upper and then
of the lower 16 bits: two passes and 512 KiB a vector, however long it is. Of one tensor, a sample
tells about where its k-th largest magnitude lies, so that one pass finds the few entries that
could be among the k largest, and the exact ones among these.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusionkit.family import Family
from fusionkit.packing import above, count_set, kth_largest, places
from fusionkit.task_vectors import TaskVectors

_BINS = 1 << 16
_PIECE = 1 << 18
_BLOCK = 1 << 20
"""Entries per block of a tensor: more than fit into a cache, so that threads, which take turns
between any two steps, take few."""
_SAMPLE = 1 << 17
_AT_ONCE = 4
"""Tasks whose candidates are in memory together; the base is read once for them."""
_DEVIATIONS = 5.0
"""How far, in standard deviations, a sample's quantile may be from the tensor's."""

Values = Callable[[TaskVectors], Iterable[Tensor]]
"""One tensor's task vectors → the T tensors whose entries are compared."""


class Kept(NamedTuple):
    """Entries that are kept: flat positions, integers and increasing, and their values."""

    positions: Tensor
    values: Tensor


@dataclass(frozen=True)
class Thresholds:
    """The k-th largest magnitude of each task's whole vector, and which of its ties are kept.

    Of equal magnitudes the first win, in the base's order: the count is exact, and the choice the
    same whoever makes it.

    Attributes:
        magnitudes: float32 `(T,)`; everything above is kept, zeros never are.
        ties: tensor's name → int64 `(T,)`, how many of its entries of exactly that magnitude are
            kept; a tensor that is not in it keeps all of them.
    """

    magnitudes: Tensor
    ties: Mapping[str, Tensor]

    @classmethod
    def over(
        cls, family: Family, counts: list[int], values: Values | None = None, ties: bool = True
    ) -> "Thresholds":
        """Find what keeps exactly `counts[t]` entries of task t's vector (zeros excepted).

        Two passes; a third, to count ties, only where some of them are not kept.

        Args:
            family: the tasks.
            counts: how many entries of each task are kept.
            values: what is compared, if not the task vectors.
            ties: whether ties are told apart; else all are kept.
        """
        upper = family.total(lambda vectors: _histogram(_by_task(vectors, values), counts))
        if upper is None:
            return cls(torch.full((len(counts),), torch.inf), {})
        bins = [_descend(upper[t], count) for t, count in enumerate(counts)]
        lower = family.total(lambda vectors: _histogram(_by_task(vectors, values), counts, bins))
        assert lower is not None
        found = [_descend(lower[t], wanted) for t, (_, wanted) in enumerate(bins)]
        bits = [bin_ << 16 | low for (bin_, _), (low, _) in zip(bins, found, strict=True)]
        magnitudes = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        magnitudes[torch.tensor(counts) <= 0] = torch.inf
        partly = [left < int(lower[t][low]) for t, (low, left) in enumerate(found)]
        if not ties or not any(partly):
            return cls(magnitudes, {})
        present = family.each(lambda vectors: _ties(_by_task(vectors, values), magnitudes))
        left = torch.tensor([left for _, left in found])
        kept = {}
        for name, there in present.items():
            kept[name] = torch.minimum(there, left)
            left = left - kept[name]
        return cls(magnitudes, kept)

    def positions(self, values: Tensor, task: int, name: str) -> Tensor:
        """Flat positions of the kept entries of one tensor: int64 `(count,)`, increasing.

        Args:
            values: float32, any shape.
            task: whose they are.
            name: the tensor's name.
        """
        left, found, start = self._left(name, task, values.numel()), [], 0
        for piece in _pieces(values):
            kept, left = self._kept(piece, task, left)
            found.append(kept.add_(start))
            start += piece.numel()
        return torch.cat(found)

    def of(self, vectors: TaskVectors) -> Iterator[Kept]:
        """The kept entries of each task's vector of one tensor, formed in blocks.

        Yields:
            per task what is kept, valid until the next one.
        """
        total = vectors.shape.numel()
        narrow = torch.int32 if total < 1 << 31 else torch.int64
        for task in range(len(vectors)):
            positions = _Growing("positions0", narrow, vectors.device)
            values = _Growing("values0", torch.float32, vectors.device)
            left = self._left(vectors.name, task, total)
            for place, block in vectors.blocks(_BLOCK, [task]):
                kept, left = self._kept(block[0], task, left)
                torch.index_select(block[0], 0, kept, out=values.more(len(kept)))
                positions.more(len(kept)).copy_(kept.add_(place.start))
            yield Kept(positions.filled, values.filled)

    def _left(self, name: str, task: int, total: int) -> int:
        """How many ties of a tensor are kept, at most."""
        return int(self.ties[name][task]) if name in self.ties else total

    def _kept(self, values: Tensor, task: int, left: int) -> tuple[Tensor, int]:
        """Positions of the kept entries of a piece, and how many ties may still be kept."""
        limit = float(self.magnitudes[task])
        magnitudes = values.abs()
        kept = above(magnitudes, limit)
        if limit > 0 and left:
            taken = places(magnitudes == limit)[:left]
            left -= taken.numel()
            kept[taken] = True
        return places(kept), left


class TopK:
    """The largest magnitudes of one tensor, whose values come block by block.

    It works in memory that its thread uses for one tensor after another.

    Args:
        count: how many to keep; of equal magnitudes the first win, and zeros are never kept.
        total: number of the tensor's entries.
        sample: float32 `(m,)`, some of them, from all over the tensor; what is found does not
            depend on it, but how much is looked at does.
        slot: tells it from others that are used at the same time.
    """

    def __init__(self, count: int, total: int, sample: Tensor, slot: int = 0) -> None:
        self._count = count
        self._low, self._high = _bracket(count, total, sample)  # exclusive, inclusive
        narrow = torch.int32 if total < 1 << 31 else torch.int64
        self._positions = _Growing(f"positions{slot}", narrow, sample.device)
        self._values = _Growing(f"values{slot}", torch.float32, sample.device)
        self._magnitudes = _Growing("magnitudes", torch.float32, sample.device)
        self._mask = _Growing("mask", torch.bool, sample.device)

    def add(self, values: Tensor, start: int) -> None:
        """Take a block: float32 `(n,)`, the tensor's entries from `start` on."""
        if self._count <= 0:
            return
        near = self._above(values, self._low)
        torch.index_select(values, 0, near, out=self._values.more(len(near)))
        self._positions.more(len(near)).copy_(near.add_(start))

    def result(self) -> Kept | None:
        """What is kept, until the next tensor; None if the sample misled.

        Then the blocks must come again, from the start; the second time all of them are looked at.
        """
        size = self._values.size
        if size < self._count and self._low > 0:
            self._low, self._high = 0.0, math.inf
            self._values.size = self._positions.size = 0
            return None
        if size > max(self._count, 0):
            self._drop_smaller()
        return Kept(self._positions.filled, self._values.filled)

    def _above(self, values: Tensor, limit: float) -> Tensor:
        """Where magnitudes are above a limit; `_magnitudes` are theirs from here on."""
        self._magnitudes.size = self._mask.size = 0
        magnitudes = torch.abs(values, out=self._magnitudes.more(len(values)))
        return places(above(magnitudes, limit, out=self._mask.more(len(values))))

    def _drop_smaller(self) -> None:
        """Of more entries than are kept, keep the largest, in place."""
        left, unsure = self._count, []
        for values in _pieces(self._values.filled):
            left -= len(self._above(values, self._high))
            unsure.append(self._magnitudes.filled[places(~self._mask.filled)])
        if left <= 0:  # the sample misled the other way: all of them are uncertain
            left, unsure = self._count, [self._values.filled.abs()]
        limit = kth_largest(torch.cat(unsure), left)
        ties = self._count - sum(
            len(self._above(values, limit)) for values in _pieces(self._values.filled)
        )
        found = list(
            zip(_pieces(self._values.filled), _pieces(self._positions.filled), strict=True)
        )
        self._values.size = self._positions.size = 0
        for values, positions in found:
            kept = self._above(values, limit)
            if ties:
                taken = places(self._magnitudes.filled == limit)[:ties]
                self._mask.filled[taken] = True
                ties -= len(taken)
                kept = places(self._mask.filled)
            # Through copies: what is kept moves towards the front of the same memory.
            self._values.more(len(kept)).copy_(values.index_select(0, kept))
            self._positions.more(len(kept)).copy_(positions.index_select(0, kept))


class _Memory(threading.local):
    """Memory that a thread uses again: fresh pages cost more than what is computed in them."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_MEMORY = _Memory()


class _Growing:
    """A tensor that grows, in its thread's memory.

    Args:
        name: tells it from others that are used at the same time.
        dtype: its dtype.
        device: where it is.

    Attributes:
        size: how many entries are filled.
    """

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device) -> None:
        self._key = name, dtype, device
        self.size = 0
        _MEMORY.buffers.setdefault(self._key, torch.empty(0, dtype=dtype, device=device))

    @property
    def filled(self) -> Tensor:
        """What is filled."""
        return _MEMORY.buffers[self._key][: self.size]

    def more(self, count: int) -> Tensor:
        """The next entries, to be filled."""
        end = self.size + count
        memory = _MEMORY.buffers[self._key]
        if end > len(memory):
            grown = memory.new_empty(max(end, 3 * len(memory) // 2))
            grown[: self.size] = memory[: self.size]
            memory = _MEMORY.buffers[self._key] = grown
        self.size = end
        return memory[end - count : end]


def top_k(values: Tensor, count: int) -> Tensor:
    """Flat positions of the `count` largest magnitudes of one tensor, zeros excepted.

    Args:
        values: float32, any shape.
        count: how many to keep; the first of equal magnitudes win.

    Returns:
        int64 `(min(count, non-zeros),)`, increasing.
    """
    flat = values.reshape(-1)
    stride = max(flat.numel() // _SAMPLE, 1) | 1  # odd: not in step with a matrix's rows
    search = TopK(count, flat.numel(), flat[::stride])
    while True:
        start = 0
        for piece in _pieces(flat):
            search.add(piece, start)
            start += piece.numel()
        found = search.result()
        if found is not None:
            return found.positions.to(torch.int64, copy=True)


def top_k_of(vectors: TaskVectors, count: int) -> Iterator[Kept]:
    """The `count` largest magnitudes of each task's vector of one tensor, formed in blocks.

    Yields:
        per task what is kept, valid until the next one.
    """
    total, samples = vectors.shape.numel(), vectors.sample(_SAMPLE)
    for first in range(0, len(vectors), _AT_ONCE):
        tasks = range(first, min(first + _AT_ONCE, len(vectors)))
        searches = {task: TopK(count, total, samples[task], slot=task - first) for task in tasks}
        found: dict[int, Kept] = {}
        while len(found) < len(tasks):
            left = [task for task in tasks if task not in found]
            for place, block in vectors.blocks(_BLOCK, left):
                for task, values in zip(left, block, strict=True):
                    searches[task].add(values, place.start)
            for task in left:
                if (kept := searches[task].result()) is not None:
                    found[task] = kept
        yield from (found[task] for task in tasks)


def _bracket(count: int, total: int, sample: Tensor) -> tuple[float, float]:
    """Between which magnitudes the count-th largest one almost surely lies."""
    size = sample.numel()
    if size in (0, total) or not 0 < count < total:
        return 0.0, math.inf
    share = count / total
    place = size * (1 - share)
    margin = _DEVIATIONS * math.sqrt(size * share * (1 - share)) + 2
    ordered = np.sort(sample.abs().cpu().numpy())
    low, high = math.floor(place - margin), math.ceil(place + margin)
    # One float less, since it is to be looked at itself.
    return (
        float(np.nextafter(ordered[low], np.float32(0))) if low >= 0 else 0.0,
        float(ordered[high]) if high < size else math.inf,
    )


def _by_task(vectors: TaskVectors, values: Values | None) -> Iterator[Iterable[Tensor]]:
    """Each task's entries of one tensor, in pieces."""
    if values is not None:
        yield from map(_pieces, values(vectors))
        return
    for task in range(len(vectors)):
        yield (piece for _, block in vectors.blocks(_BLOCK, [task]) for piece in _pieces(block))


def _histogram(
    tasks: Iterable[Iterable[Tensor]], counts: list[int], bins: list[tuple[int, int]] | None = None
) -> Tensor:
    """How often the upper 16 bits occur, or the lower ones of a bin: int64 `(T, 65536)`."""
    found = torch.zeros(len(counts), _BINS, dtype=torch.int64)
    for task, pieces in enumerate(tasks):
        for piece in pieces:
            bits = piece.abs().view(torch.int32)
            if bins is None:
                bits >>= 16
            else:
                bits = bits[(bits >> 16) == bins[task][0]] & (_BINS - 1)
            found[task] += torch.bincount(bits, minlength=_BINS).cpu()
    return found


def _ties(tasks: Iterable[Iterable[Tensor]], magnitudes: Tensor) -> Tensor:
    """How many entries are of exactly these magnitudes: int64 `(T,)`."""
    found = [
        sum(count_set(piece.abs() == float(limit)) for piece in pieces)
        for limit, pieces in zip(magnitudes, tasks, strict=True)
    ]
    return torch.tensor(found)


def _pieces(values: Tensor) -> tuple[Tensor, ...]:
    """The flat entries, in pieces that stay in cache."""
    return torch.split(values.reshape(-1), _PIECE)


def _descend(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin in which the count-th largest entry lies, and which one of the bin it is."""
    if count <= 0:
        return 0, 0
    above = torch.cumsum(histogram.flip(0), 0)
    place = int(torch.searchsorted(above, count))
    if place >= _BINS:  # fewer entries than asked for: keep them all
        return 0, int(histogram[0])
    before = int(above[place - 1]) if place else 0
    return _BINS - 1 - place, count - before
