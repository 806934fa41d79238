"""Stacks of experts seen as the matrices that they are: `experts.gate_up_proj[3]` of (E, out, in).

Codecs, budgets and sizes then count E matrices, however a file has them: joined, or one by one.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.checkpoints.checkpoint import Checkpoint, Pieces, TensorSpec
from fusionkit.checkpoints.view import View

Stacks = Mapping[str, int]
"""Name of a stack → how many matrices it has."""


def row_name(stack: str, index: int) -> str:
    """The name of one of a stack's matrices."""
    return f"{stack}[{index}]"


def rows_of(stacks: Stacks) -> dict[str, tuple[str, int]]:
    """Name of a matrix → the stack that it is in, and its place there."""
    return {row_name(name, i): (name, i) for name, count in stacks.items() for i in range(count)}


def whole_names(names: Iterable[str], stacks: Stacks) -> list[str]:
    """Names of tensors, a stack's own for those of its matrices, each once."""
    rows = rows_of(stacks)
    return list(dict.fromkeys(rows[name][0] if name in rows else name for name in names))


def split(checkpoint: Checkpoint, stacks: Stacks) -> Checkpoint:
    """See a checkpoint's stacks as their matrices.

    Args:
        checkpoint: the checkpoint; stacks that it lacks are left out.
        stacks: which of its tensors are to be split.
    """
    own = {name: count for name, count in stacks.items() if name in checkpoint}
    return Split(checkpoint, own) if own else checkpoint


def unsplit(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint that `split` was called with; one that is not split, itself."""
    return checkpoint.below if isinstance(checkpoint, Split) else checkpoint


def whole_name(checkpoint: Checkpoint, name: str) -> str:
    """A tensor's name, of a matrix its stack's, which is what a user's patterns match."""
    return name if name in unsplit(checkpoint) else name.rpartition("[")[0]


class Split(View):
    """A checkpoint whose stacks are seen as their matrices; what is not given is as below.

    Args:
        below: the checkpoint.
        stacks: name of a stack in it → how many matrices it has.
    """

    def __init__(self, below: Checkpoint, stacks: Stacks) -> None:
        super().__init__(below, {name: name for name in below if name not in stacks})
        self._stacks = dict(stacks)
        self._rows = rows_of(stacks)
        specs: dict[str, TensorSpec] = {}
        for name, spec in below.specs.items():  # in the order that they have below
            if name in stacks:
                row = TensorSpec(spec.shape[1:], spec.dtype)
                specs.update({row_name(name, i): row for i in range(stacks[name])})
            else:
                specs[name] = spec
        self.specs = specs
        self.architecture = below.architecture

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, or one matrix of a stack."""
        if name in self._rows:
            return self._below.row(*self._rows[name])
        return super().__getitem__(name)

    def pieces(self, name: str) -> Pieces:
        """Read one tensor, or one matrix of a stack, piece by piece."""
        if name in self._rows:
            return self._below.row_pieces(*self._rows[name])
        return super().pieces(name)

    def prefetch(self, name: str) -> None:
        """Have a tensor, or one matrix of a stack, read ahead."""
        if name in self._rows:
            self._below.prefetch_row(*self._rows[name])
        else:
            super().prefetch(name)

    @property
    def below(self) -> Checkpoint:
        """The checkpoint whose stacks are whole."""
        return self._below

    @property
    def plain(self) -> Checkpoint:
        """The model alone, split likewise."""
        plain = self._below.plain
        return self if plain is self._below else split(plain, self._stacks)

    @property
    def stored(self) -> Checkpoint:
        """An adapter's own tensors; else itself."""
        stored = self._below.stored
        return self if stored is self._below else stored

    def touches(self, name: str) -> bool:
        """As below."""
        return self._below.touches(self._rows[name][0] if name in self._rows else name)

    def delta(self, name: str) -> Tensor | None:
        """As below, or one matrix of it."""
        if name in self._rows:
            return self._below.row_delta(*self._rows[name])
        return self._below.delta(name)

    def low_rank(self, name: str) -> LowRank | None:
        """As below, or of one matrix."""
        if name in self._rows:
            return self._below.row_low_rank(*self._rows[name])
        return self._below.low_rank(name)

    def in_memory(self, device: torch.device | None = None) -> Checkpoint:
        """A copy of what is below, split likewise."""
        return split(self._below.in_memory(device), self._stacks)


class SplitTensors(Mapping[str, Tensor]):
    """Tensors by name, of which stacks are seen as their matrices: views, which can be written to.

    Args:
        tensors: by name; asked again for the same stack they may give the same tensor or another
            that shares its memory.
        stacks: name of a stack → how many matrices it has; those that are not there are left out.
    """

    def __init__(self, tensors: Mapping[str, Tensor], stacks: Stacks) -> None:
        self._tensors = tensors
        self._stacks = {name: count for name, count in stacks.items() if name in tensors}
        self._rows = rows_of(self._stacks)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._rows:
            stack, index = self._rows[name]
            return self._tensors[stack][index]
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._rows or (name in self._tensors and name not in self._stacks)

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._tensors if name not in self._stacks)
        yield from self._rows

    def __len__(self) -> int:
        return len(self._tensors) - len(self._stacks) + len(self._rows)


def split_tensors(tensors: Mapping[str, Tensor], stacks: Stacks) -> Mapping[str, Tensor]:
    """See tensors' stacks as their matrices, of a checkpoint as of any other mapping."""
    if isinstance(tensors, Checkpoint):
        return split(tensors, stacks)
    return SplitTensors(tensors, stacks) if any(name in tensors for name in stacks) else tensors


def joined(tensors: Mapping[str, Tensor], stacks: Stacks) -> dict[str, Tensor]:
    """The same with every stack whole again, where it was; differentiable."""
    rows, left = rows_of(stacks), dict(tensors)
    whole: dict[str, Tensor] = {}
    for name in tensors:
        stack, index = rows.get(name, (name, 0))
        if stack == name:
            whole[name] = left.pop(name)
        elif index == 0:
            whole[stack] = torch.stack([left.pop(row_name(stack, i)) for i in range(stacks[stack])])
    return whole
