"""A base with an adapter's initial tensors laid over it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusionkit.checkpoints.checkpoint import Checkpoint, Pieces
from fusionkit.checkpoints.in_memory import specs_of


class WithStart(Checkpoint):
    """A base, and beside its tensors those that an adapter starts from.

    Args:
        base: the base.
        start: the initial tensors by name.
    """

    def __init__(self, base: Checkpoint, start: Mapping[str, Tensor]) -> None:
        self._below, self._start = base, start
        self.label, self.live, self.serial = base.label, base.live, base.serial
        self.strip_prefix, self.add_prefix = base.strip_prefix, base.add_prefix
        self.variant, self.rename = base.variant, dict(base.rename)
        self.dequantized = base.dequantized
        self.nbytes, self.files, self.buffers = base.nbytes, base.files, base.buffers
        self.architecture, self.unread = base.architecture, base.unread
        self.specs = {**base.specs, **specs_of(start)}
        self.aliases = {name: to for name, to in base.aliases.items() if name not in start}

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor of the base, or an initial one."""
        return self._start[name] if name in self._start else self._below[name]

    def pieces(self, name: str) -> Pieces:
        """Read one tensor piece by piece, as the base does."""
        return super().pieces(name) if name in self._start else self._below.pieces(name)

    def prefetch(self, name: str) -> None:
        """Have a tensor of the base read ahead."""
        if name not in self._start:
            self._below.prefetch(name)

    def row(self, name: str, index: int) -> Tensor:
        """Read one entry along a tensor's first axis, as the base does."""
        return self._below.row(name, index)

    def row_pieces(self, name: str, index: int) -> Pieces:
        """Read the same piece by piece, as the base does."""
        return self._below.row_pieces(name, index)

    @property
    def plain(self) -> Checkpoint:
        """The base."""
        return self._below.plain

    def in_memory(self, device: torch.device | None = None) -> Checkpoint:
        """A copy of both, which can be told apart there, too."""
        start = {n: t.to(device or t.device, copy=True) for n, t in self._start.items()}
        return WithStart(self._below.in_memory(device), start)
