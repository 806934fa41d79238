"""Exact top-k by magnitude, over one tensor or over the whole model; nothing is sorted.

The bits of a non-negative float32, read as an integer, are ordered like the floats. The whole
model's k-th largest magnitude is therefore found exactly by two histograms, of the upper and then
of the lower 16 bits: two passes and 512 KiB a vector, however long it is. Of one tensor, a sample
tells about where its k-th largest magnitude lies, so that one pass finds the few entries that
could be among the k largest, and the exact ones among these.
"""

import math
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
_PIECE = 1 << 17
_SAMPLE = 1 << 17
_AT_ONCE = 4
"""Tasks whose candidates are in memory together; the base is read once for them."""
_DEVIATIONS = 5.0
"""How far, in standard deviations, a sample's quantile may be from the tensor's."""

Values = Callable[[TaskVectors], Iterable[Tensor]]
"""One tensor's task vectors → the T tensors whose entries are compared."""


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
        cls, family: Family, counts: list[int], values: Values = iter, ties: bool = True
    ) -> "Thresholds":
        """Find what keeps exactly `counts[t]` entries of task t's vector (zeros excepted).

        Two passes; a third, to count ties, only where some of them are not kept.

        Args:
            family: the tasks.
            counts: how many entries of each task are kept.
            values: what is compared, if not the task vectors.
            ties: whether ties are told apart; else all are kept.
        """
        upper = family.total(lambda vectors: _histogram(values(vectors), counts))
        if upper is None:
            return cls(torch.full((len(counts),), torch.inf), {})
        bins = [_descend(upper[t], count) for t, count in enumerate(counts)]
        lower = family.total(lambda vectors: _histogram(values(vectors), counts, bins))
        assert lower is not None
        found = [_descend(lower[t], wanted) for t, (_, wanted) in enumerate(bins)]
        bits = [bin_ << 16 | low for (bin_, _), (low, _) in zip(bins, found, strict=True)]
        magnitudes = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        magnitudes[torch.tensor(counts) <= 0] = torch.inf
        partly = [left < int(lower[t][low]) for t, (low, left) in enumerate(found)]
        if not ties or not any(partly):
            return cls(magnitudes, {})
        present = family.each(lambda vectors: _ties(values(vectors), magnitudes))
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
        limit = float(self.magnitudes[task])
        left = int(self.ties[name][task]) if name in self.ties else values.numel()
        found, start = [], 0
        for piece in _pieces(values):
            magnitudes = piece.abs()
            kept = above(magnitudes, limit)
            if limit > 0 and left:
                taken = places(magnitudes == limit)[:left]
                left -= taken.numel()
                kept[taken] = True
            found.append(places(kept).add_(start))
            start += piece.numel()
        return torch.cat(found)


class Kept(NamedTuple):
    """Entries that are kept: flat positions, integers and increasing, and their values."""

    positions: Tensor
    values: Tensor


class TopK:
    """The largest magnitudes of one tensor, whose values come block by block.

    Args:
        count: how many to keep; of equal magnitudes the first win, and zeros are never kept.
        total: number of the tensor's entries.
        sample: float32 `(m,)`, some of them, from all over the tensor; what is found does not
            depend on it, but how much is looked at does.
    """

    def __init__(self, count: int, total: int, sample: Tensor) -> None:
        self._count = count
        self._low, self._high = _bracket(count, total, sample)  # exclusive, inclusive
        self._found: list[Kept] = []
        self._magnitudes, self._mask = torch.empty(0), torch.empty(0, dtype=torch.bool)
        self._narrow = torch.int32 if total < 1 << 31 else torch.int64

    def add(self, values: Tensor, start: int) -> None:
        """Take a block: float32 `(n,)`, the tensor's entries from `start` on."""
        if self._count <= 0:
            return
        if len(values) > self._magnitudes.numel():  # memory that is used again for each block
            self._magnitudes = torch.empty_like(values)
            self._mask = torch.empty_like(values, dtype=torch.bool)
        magnitudes = torch.abs(values, out=self._magnitudes[: len(values)])
        near = places(above(magnitudes, self._low, out=self._mask[: len(values)]))
        self._found.append(Kept(near.add(start).to(self._narrow), values.index_select(0, near)))

    def result(self) -> Kept | None:
        """What is kept; None if the sample misled, and the blocks must come again, from the start.

        The second time all of them are looked at.
        """
        found, self._found = self._found, []
        size = sum(len(each.values) for each in found)
        if size < self._count and self._low > 0:
            self._low, self._high = 0.0, math.inf
            return None
        if size > max(self._count, 0):
            found = self._largest(found)
        if not found:
            empty = torch.empty(0)
            return Kept(empty.to(torch.int64), empty)
        positions = torch.cat([each.positions for each in found])
        return Kept(positions, torch.cat([each.values for each in found]))

    def _largest(self, found: list[Kept]) -> list[Kept]:
        """Of more entries than are kept, block by block: nothing large is allocated."""
        magnitudes = [each.values.abs() for each in found]
        certain = [above(each, self._high) for each in magnitudes]
        left = self._count - sum(count_set(each) for each in certain)
        if left <= 0:  # the sample misled the other way: all of them are uncertain
            certain, left = [torch.zeros_like(each) for each in certain], self._count
        unsure = torch.cat(
            [m.index_select(0, places(~c)) for m, c in zip(magnitudes, certain, strict=True)]
        )
        limit = kth_largest(unsure, left)
        kept = [above(each, limit) for each in magnitudes]
        ties = self._count - sum(count_set(each) for each in kept)
        chosen = []
        for each, mask, sizes in zip(found, kept, magnitudes, strict=True):
            if ties:
                taken = places(sizes == limit)[:ties]
                mask[taken] = True
                ties -= len(taken)
            own = places(mask)
            chosen.append(
                Kept(each.positions.index_select(0, own), each.values.index_select(0, own))
            )
        return chosen


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
            return found.positions.to(torch.int64)


def top_k_of(vectors: TaskVectors, count: int) -> Iterator[Kept]:
    """The `count` largest magnitudes of each task's vector of one tensor, formed in blocks."""
    total, samples = vectors.shape.numel(), vectors.sample(_SAMPLE)
    for first in range(0, len(vectors), _AT_ONCE):
        some = vectors.only(range(first, min(first + _AT_ONCE, len(vectors))))
        searches = [TopK(count, total, sample) for sample in samples[first : first + _AT_ONCE]]
        found: dict[int, Kept] = {}
        while len(found) < len(some):
            for place, block in some.blocks():
                for task, search in enumerate(searches):
                    if task not in found:
                        search.add(block[task], place.start)
            for task, search in enumerate(searches):
                if task not in found and (kept := search.result()) is not None:
                    found[task] = kept
        for task in range(len(some)):
            yield found.pop(task)


def _bracket(count: int, total: int, sample: Tensor) -> tuple[float, float]:
    """Between which magnitudes the count-th largest one almost surely lies."""
    size = sample.numel()
    if size == total or not size or not 0 < count < total:
        size = 0
    if not size:
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


def _histogram(
    tensors: Iterable[Tensor], counts: list[int], bins: list[tuple[int, int]] | None = None
) -> Tensor:
    """How often the upper 16 bits occur, or the lower ones of a bin: int64 `(T, 65536)`."""
    found = torch.zeros(len(counts), _BINS, dtype=torch.int64)
    for task, values in enumerate(tensors):
        for piece in _pieces(values):
            bits = piece.abs().view(torch.int32)
            if bins is None:
                bits >>= 16
            else:
                bits = bits[(bits >> 16) == bins[task][0]] & (_BINS - 1)
            found[task] += torch.bincount(bits, minlength=_BINS).cpu()
    return found


def _ties(tensors: Iterable[Tensor], magnitudes: Tensor) -> Tensor:
    """How many entries are of exactly these magnitudes: int64 `(T,)`."""
    found = [
        sum(int((piece.abs() == limit).sum()) for piece in _pieces(values))
        for limit, values in zip(magnitudes, tensors, strict=True)
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
