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

import numpy as np
import torch
from torch import Tensor

from fusionkit.task_vectors import kernels
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.kept import Collected, Kept
from fusionkit.task_vectors.kernels import above, count_set, kth_largest
from fusionkit.task_vectors.vectors import TaskVectors

_BINS = 1 << 16
_PIECE = 1 << 18
_SAMPLE = 1 << 16
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
        found = self._kept(_placed(_pieces(values)), task, name, values.numel(), values.device)
        return found.positions.to(torch.int64, copy=True)

    def of(self, vectors: TaskVectors) -> Iterator[Kept]:
        """The kept entries of each task's vector of one tensor, formed in blocks.

        Yields:
            per task what is kept, valid until the next one.
        """
        total = vectors.shape.numel()
        for task in range(len(vectors)):
            blocks = ((place.start, block[0]) for place, block in vectors.blocks(tasks=[task]))
            yield self._kept(blocks, task, vectors.name, total, vectors.device)

    def _kept(
        self,
        blocks: Iterable[tuple[int, Tensor]],
        task: int,
        name: str,
        total: int,
        device: torch.device,
    ) -> Kept:
        kept, limit = Collected("0", total, device), float(self.magnitudes[task])
        left = int(self.ties[name][task]) if name in self.ties else total
        for start, values in blocks:
            left = kept.add(values, start, limit, left if limit > 0 else 0)
        return kept.all


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
        self._near = Collected(str(slot), total, sample.device)

    def add(self, values: Tensor, start: int) -> None:
        """Take a block: float32 `(n,)`, the tensor's entries from `start` on."""
        if self._count > 0:
            self._near.add(values, start, self._low)

    def result(self) -> Kept | None:
        """What is kept, until the next tensor; None if the sample misled.

        Then the blocks must come again, from the start; the second time all of them are looked at.
        """
        values = self._near.all.values
        if len(values) < self._count and self._low > 0:
            self._low, self._high = 0.0, math.inf
            self._near.clear()
            return None
        return self._largest(values) if len(values) > self._count > 0 else self._near.all

    def _largest(self, values: Tensor) -> Kept:
        """Of more entries than are kept, the largest."""
        unsure = self._near.up_to(self._high)
        left = self._count - (len(values) - len(unsure))
        if left <= 0:  # the sample misled the other way: all of them are uncertain
            left, unsure = self._count, values.abs()
        limit = kth_largest(unsure, left)
        self._near.drop(limit, left - count_set(above(unsure, limit)))
        return self._near.all


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
        for start, piece in _placed(_pieces(flat)):
            search.add(piece, start)
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
            for place, block in vectors.blocks(tasks=left):
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
        yield (block[0] for _, block in vectors.blocks(tasks=[task]))


def _histogram(
    tasks: Iterable[Iterable[Tensor]], counts: list[int], bins: list[tuple[int, int]] | None = None
) -> Tensor:
    """How often the upper 16 bits occur, or the lower ones of a bin: int64 `(T, 65536)`."""
    found = torch.zeros(len(counts), _BINS, dtype=torch.int64)
    for task, pieces in enumerate(tasks):
        bin_ = -1 if bins is None else bins[task][0]
        for piece in pieces:
            if piece.device.type == "cpu":
                bits = piece.contiguous().view(torch.int32)
                kernels.histogram(bits.numpy(), bin_, found[task].numpy())
                continue
            bits = piece.abs().view(torch.int32)
            upper = bits >> 16
            inside = upper if bins is None else bits[upper == bin_] & (_BINS - 1)
            found[task] += torch.bincount(inside, minlength=_BINS).cpu()
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


def _placed(pieces: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Neighbouring pieces, each with its place."""
    start = 0
    for piece in pieces:
        yield start, piece
        start += piece.numel()


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
