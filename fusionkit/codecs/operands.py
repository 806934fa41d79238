"""Deltas in the form that a codec has them, for layers that use them without decoding them whole.

What a codec's `operand` returns: a few kinds, which can all be made `dense`. In a batch of many
tasks they are what is in memory of each task: a mask takes a bit per entry, and a vector that tasks
share is there once.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs.packing import unpack_bits


@dataclass(frozen=True)
class Dense:
    """All values, of a vector that tasks share: δ = s v.

    Attributes:
        values: v, of any floating dtype, as many as the tensor has.
        scale: s.
    """

    values: Tensor
    scale: float = 1.0

    def dense(self, shape: torch.Size) -> Tensor:
        """The delta, float32 `(*shape)`."""
        return self.values.to(torch.float32, copy=True).mul_(self.scale).view(shape)


@dataclass(frozen=True)
class Sparse:
    """A few values, all others zero.

    Attributes:
        positions: int64 or int32 `(count,)`, in row-major order.
        values: floating `(count,)`.
        scale: what they are multiplied by.
    """

    positions: Tensor
    values: Tensor
    scale: float = 1.0

    @classmethod
    def of(cls, positions: Tensor, values: Tensor, shape: torch.Size) -> "Sparse":
        """A few values of a tensor of this shape, the positions in as few bytes as do."""
        small = shape.numel() <= torch.iinfo(torch.int32).max
        return cls(positions.to(torch.int32) if small else positions, values)

    def dense(self, shape: torch.Size) -> Tensor:
        """The delta, float32 `(*shape)`."""
        delta = torch.zeros(shape.numel(), device=self.values.device)
        delta[self.positions.long()] = self.values.to(torch.float32) * self.scale
        return delta.view(shape)


@dataclass(frozen=True)
class Masked:
    """Those of a shared vector's values where a mask is 1: δ = s M ⊙ v.

    Attributes:
        values: v, of any floating dtype, as many as the tensor has.
        mask: M, packed: uint8 `(ceil(numel / 8),)`; see `packing`.
        scale: s.
    """

    values: Tensor
    mask: Tensor
    scale: float = 1.0

    def dense(self, shape: torch.Size) -> Tensor:
        """The delta, float32 `(*shape)`."""
        delta = self.values.to(torch.float32, copy=True).view(-1)
        return delta.mul_(unpack_bits(self.mask, len(delta))).mul_(self.scale).view(shape)


@dataclass(frozen=True)
class Signs:
    """A sign per entry, times a scale: δ = s ⊙ (2 B − 1).

    Attributes:
        bits: B, packed: uint8 `(ceil(numel / 8),)`; see `packing`.
        scale: s, floating, of a shape that spreads over the tensor as a matrix, (first axis) ×
            (all others).
    """

    bits: Tensor
    scale: Tensor

    def dense(self, shape: torch.Size) -> Tensor:
        """The delta, float32 `(*shape)`."""
        signs = unpack_bits(self.bits, shape.numel()).to(torch.float32).mul_(2).sub_(1)
        matrix = signs.view(shape[0], -1) if shape else signs.view(1, 1)
        return matrix.mul_(self.scale.to(torch.float32)).view(shape)


@dataclass(frozen=True)
class Sum:
    """Several at once.

    Attributes:
        terms: what is added up.
    """

    terms: tuple["Operand", ...]

    def dense(self, shape: torch.Size) -> Tensor:
        """The delta, float32 `(*shape)`."""
        first, *others = self.terms
        delta = first.dense(shape)
        for term in others:
            delta += term.dense(shape)
        return delta


Operand = LowRank | Dense | Sparse | Masked | Signs | Sum
"""A delta as a codec has it; `dense(shape)` decodes it."""


def scaled(operand: Operand, scale: float) -> Operand:
    """A delta times a number, in the same form."""
    if isinstance(operand, LowRank):
        return LowRank(operand.left * scale, operand.right)
    if isinstance(operand, Sum):
        return Sum(tuple(scaled(term, scale) for term in operand.terms))
    return replace(cast(Any, operand), scale=operand.scale * scale)  # type: ignore[no-any-return]


def changed(operand: Operand, change: Callable[[Tensor], Tensor]) -> Operand:
    """The same of other tensors: moved, say, or copied."""
    if isinstance(operand, LowRank):
        return LowRank(*map(change, operand))
    if isinstance(operand, Sum):
        return Sum(tuple(changed(term, change) for term in operand.terms))
    own = {f.name: getattr(operand, f.name) for f in fields(operand)}
    tensors = {name: change(value) for name, value in own.items() if isinstance(value, Tensor)}
    return replace(cast(Any, operand), **tensors)  # type: ignore[no-any-return]


def tensors_of(operand: Operand) -> list[Tensor]:
    """What an operand holds."""
    found: list[Tensor] = []

    def seen(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    changed(operand, seen)
    return found
