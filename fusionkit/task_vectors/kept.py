"""Entries of a tensor that are kept, collected from its blocks, on any device."""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from fusionkit.task_vectors import kernels
from fusionkit.task_vectors.kernels import places


class Kept(NamedTuple):
    """Entries that are kept: flat positions, integers and increasing, and their values."""

    positions: Tensor
    values: Tensor


class _Memory(threading.local):
    """Memory that a thread uses again: fresh pages cost more than what is computed in them."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_MEMORY = _Memory()


class Collected:
    """Entries of one tensor above a magnitude, in their thread's memory.

    Args:
        slot: tells it from others that are used at the same time.
        total: number of the tensor's entries.
        device: where it is.
    """

    def __init__(self, slot: str, total: int, device: torch.device) -> None:
        narrow = torch.int32 if total < 1 << 31 else torch.int64
        self._positions = _Growing(f"positions {slot}", narrow, device)
        self._values = _Growing(f"values {slot}", torch.float32, device)

    def clear(self) -> None:
        """Forget them."""
        self._positions.size = self._values.size = 0

    @property
    def all(self) -> Kept:
        """What was collected."""
        return Kept(self._positions.filled, self._values.filled)

    def add(self, values: Tensor, start: int, limit: float, ties: int = 0) -> int:
        """Collect from a block: float32 `(n,)`, whose place in the tensor is `start`.

        Args:
            values: the block.
            start: its place.
            limit: the magnitude above which entries are kept.
            ties: how many entries of exactly that magnitude are kept, at most.

        Returns:
            how many more of them would be.
        """
        if values.device.type == "cpu":
            count = len(values)
            room = self._positions.more(count).numpy(), self._values.more(count).numpy()
            found, ties = kernels.collect(values.numpy(), limit, ties, start, *room)
            self._positions.size -= count - found
            self._values.size -= count - found
            return ties
        kept, ties = places_above(values, limit, ties)
        torch.index_select(values, 0, kept, out=self._values.more(len(kept)))
        self._positions.more(len(kept)).copy_(kept.add_(start))
        return ties

    def up_to(self, limit: float) -> Tensor:
        """The magnitudes, of what was collected, that are not above a limit."""
        values = self._values.filled
        magnitudes = _Growing("magnitudes", torch.float32, values.device).more(len(values))
        if values.device.type == "cpu":
            return magnitudes[: kernels.up_to(values.numpy(), limit, magnitudes.numpy())]
        torch.abs(values, out=magnitudes)
        return magnitudes[magnitudes <= limit]

    def drop(self, limit: float, ties: int) -> None:
        """Keep only what is above a limit, and the first few that equal it."""
        positions, values = self.all
        if values.device.type == "cpu":
            size = kernels.drop(positions.numpy(), values.numpy(), limit, ties)
        else:
            kept, _ = places_above(values, limit, ties)
            size = len(kept)
            positions[:size], values[:size] = positions[kept], values[kept]
        self._positions.size = self._values.size = size


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


def places_above(values: Tensor, limit: float, ties: int) -> tuple[Tensor, int]:
    """Where magnitudes are above a limit, or the first few that equal it; and the ties left."""
    magnitudes = values.abs()
    mask = magnitudes > limit
    if ties:
        equal = places(magnitudes == limit)[:ties]
        mask[equal] = True
        ties -= len(equal)
    return places(mask), ties
