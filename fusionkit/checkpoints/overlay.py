"""Checkpoints made of a base and an adapter: the base with what it does to it, read lazily."""

from collections.abc import Mapping

from torch import Tensor

from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.safetensors_file import Pieces, TensorSpec


class Overlay(Checkpoint):
    """A base with some tensors added or replaced; read one at a time like any checkpoint.

    Args:
        base: what lies below.
        specs: name → shape and dtype of the tensors on top.
    """

    def __init__(self, base: Checkpoint, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__(base)
        self.below = base
        self.label, self.live, self.serial = base.label, base.live, base.serial
        self.strip_prefix, self.add_prefix = base.strip_prefix, base.add_prefix
        self.specs = {**self.specs, **specs}
        self.aliases = {name: to for name, to in self.aliases.items() if name not in specs}

    def top(self, name: str) -> Tensor | None:
        """The tensor that lies on top, or None where the base's is to be read."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        top = self.top(name)
        return self.below[name] if top is None else top

    def prefetch(self, name: str) -> None:
        """Have a tensor of the base read ahead."""
        if name in self.below:
            self.below.prefetch(name)

    def pieces(self, name: str) -> Pieces:
        """Read one tensor piece by piece; what lies on top is made whole."""
        top = self.top(name)
        return self.below.pieces(name) if top is None else top.reshape(-1).__getitem__


class WithStart(Overlay):
    """A base, and beside its tensors those that an adapter starts from.

    Args:
        base: the base.
        start: the initial tensors by name.
    """

    def __init__(self, base: Checkpoint, start: Mapping[str, Tensor]) -> None:
        specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in start.items()}
        super().__init__(base, specs)
        self._start = start

    def top(self, name: str) -> Tensor | None:
        """An initial tensor."""
        return self._start.get(name)
