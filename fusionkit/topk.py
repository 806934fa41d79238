"""Exact top-k by magnitude, over one tensor or over a whole stream of tensors.

The bits of a non-negative float32, read as an integer, are ordered like the floats. A stream's
k-th largest magnitude is therefore found exactly by two histograms, of the upper and then of the
lower 16 bits: two passes and 512 KiB a vector, however long it is; nothing is sorted.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_BINS = 1 << 16
_PIECE = 1 << 20

Stream = Callable[[], Iterable[Iterable[Tensor]]]
"""Starts a pass: per tensor of the model, the T vectors' values of that tensor."""


@dataclass
class Thresholds:
    """The k-th largest magnitude of each of T vectors, and how many of its ties are kept.

    `positions` must then be asked for tensor by tensor in the order of the stream: ties are
    kept first come, first served, so that the count is exact and the choice deterministic.

    Attributes:
        magnitudes: float32 `(T,)`; everything above is kept, zeros never are.
        ties: per vector, how many entries of exactly that magnitude are still to be kept.
    """

    magnitudes: Tensor
    ties: list[int] = field(default_factory=list)

    @classmethod
    def over(cls, stream: Stream, counts: list[int]) -> "Thresholds":
        """Find what keeps exactly `counts[t]` entries of vector t (zeros excepted)."""
        upper = torch.zeros(len(counts), _BINS, dtype=torch.int64)
        for tensors in stream():
            for t, values in enumerate(tensors):
                for piece in _pieces(values):
                    upper[t] += torch.bincount(_bits(piece) >> 16, minlength=_BINS)
        found = [_descend(upper[t], count) for t, count in enumerate(counts)]
        lower = torch.zeros(len(counts), _BINS, dtype=torch.int64)
        for tensors in stream():
            for t, values in enumerate(tensors):
                for piece in _pieces(values):
                    bits = _bits(piece)
                    inside = bits[(bits >> 16) == found[t][0]]
                    lower[t] += torch.bincount(inside & (_BINS - 1), minlength=_BINS)
        bits_at, ties = [], []
        for t, (bin_, wanted) in enumerate(found):
            low, left = _descend(lower[t], wanted)
            bits_at.append((bin_ << 16) | low)
            ties.append(left)
        magnitudes = torch.tensor(bits_at, dtype=torch.int32).view(torch.float32)
        magnitudes[torch.tensor(counts) <= 0] = torch.inf
        return cls(magnitudes, ties)

    def positions(self, values: Tensor, vector: int = 0) -> Tensor:
        """Flat positions of the kept entries of one tensor: int64 `(count,)`, increasing."""
        limit = self.magnitudes[vector]
        found, start = [], 0
        for piece in _pieces(values):
            magnitudes = piece.abs()
            kept = magnitudes > limit
            if self.ties[vector] and limit > 0:
                taken = (magnitudes == limit).nonzero().reshape(-1)[: self.ties[vector]]
                self.ties[vector] -= taken.numel()
                kept[taken] = True
            found.append(kept.nonzero().reshape(-1).add_(start))
            start += piece.numel()
        return torch.cat(found)


def top_k(values: Tensor, count: int) -> Tensor:
    """Flat positions of the `count` largest magnitudes of one tensor, zeros excepted.

    Args:
        values: float32, any shape.
        count: how many to keep; the first of equal magnitudes win.

    Returns:
        int64 `(min(count, non-zeros),)`, increasing.
    """
    return Thresholds.over(lambda: [[values]], [count]).positions(values)


def _pieces(values: Tensor) -> tuple[Tensor, ...]:
    """The flat entries, in pieces that stay in cache."""
    return torch.split(values.reshape(-1), _PIECE)


def _bits(values: Tensor) -> Tensor:
    return values.reshape(-1).abs().view(torch.int32)


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
