"""A merged model for every task, and the shared vector that other codecs build on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fusionkit.codecs.base import DeltaCodec, Encoded, Encoder, Parts, SharedParts
from fusionkit.codecs.layout import Layout
from fusionkit.codecs.operands import Dense
from fusionkit.codecs.values import (
    ValueDtype,
    held_values,
    pack_values,
    unpack_values,
    values_bytes,
    values_layout,
)
from fusionkit.merges.base import Merge
from fusionkit.merges.mean import Mean
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import TaskVectors

_PART = "merged"


@dataclass(frozen=True)
class Merged(DeltaCodec):
    """Plain merging: every task gets the merged model, θ̂_t = θ₀ + τ*; a task owns nothing.

    τ* is off from the merge's formula by the rounding of its dtype, and of float32's sums.

    Args:
        merge: how the shared vector is computed.
        dtype: how its values are stored.
    """

    id: ClassVar[str] = "merged"
    cost: ClassVar[str] = "nothing; shared by all: b P bits in a dtype of b bits"
    merge: Merge = field(default_factory=Mean)
    dtype: ValueDtype = "fp16"

    def likely_bytes(self, shapes: Mapping[str, Sequence[int]], tasks: int) -> int | None:
        """The vector that all share."""
        return values_bytes(shapes, self.dtype)

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """The passes that the merge itself needs."""
        vector = SharedVector(self.merge, self.dtype, family, shared)
        return Encoder(lambda vectors: Encoded(vectors.name, vector.of(vectors).parts))

    def layout(self, shape: torch.Size) -> Layout:
        """The shared vector."""
        return shared_layout(shape, self.dtype)

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """τ*."""
        return decode_shared(parts, shape, self.dtype)

    def operand(self, parts: Parts, shape: torch.Size) -> Dense | None:
        """The vector, which all tasks share."""
        return shared_operand(parts, shape, self.dtype)


class StoredVector(NamedTuple):
    """A shared vector's values as stored (None: there is no merge) and the parts to store."""

    values: Tensor | None
    parts: Parts


class SharedVector:
    """The shared vector of each tensor, as it will be read back: merged, or a bundle's own.

    Args:
        merge: how to merge, or None for no shared vector.
        dtype: how its values are stored.
        family: whose task vectors to merge.
        shared: the stored parts, where tasks are added to a bundle.
    """

    def __init__(
        self, merge: Merge | None, dtype: ValueDtype, family: Family, shared: SharedParts | None
    ) -> None:
        self._wanted = merge is not None
        self._dtype = dtype
        self._shared = shared
        self._merge = merge.prepare(family) if merge and shared is None else None

    def of(self, vectors: TaskVectors) -> StoredVector:
        """The shared vector of one tensor, float32 `(*shape)`."""
        if not self._wanted:
            return StoredVector(None, {})
        if self._merge is None:
            assert self._shared is not None
            stored = decode_shared(self._shared(vectors.name), vectors.shape, self._dtype)
            return StoredVector(stored.to(vectors.device), {})
        merged = self._merge(vectors)
        if not merged.any():
            return StoredVector(None, {})
        parts = pack_values(merged.view(-1), self._dtype, _PART)
        return StoredVector(decode_shared(parts, vectors.shape, self._dtype), parts)


def shared_layout(shape: torch.Size, dtype: ValueDtype) -> Layout:
    """What the parts of a shared vector must be."""
    return values_layout((shape.numel(),), dtype, _PART)


def shared_operand(parts: Parts, shape: torch.Size, dtype: ValueDtype) -> Dense | None:
    """The shared vector, to be kept in memory; None where none is stored."""
    if _PART not in parts:
        return None
    return Dense(held_values(parts, shape.numel(), dtype, _PART))


def decode_shared(parts: Parts, shape: torch.Size, dtype: ValueDtype) -> Tensor:
    """The shared vector, float32 `(*shape)`; zeros where none is stored."""
    if _PART in parts:
        return unpack_values(parts, shape.numel(), dtype, _PART).view(shape)
    device = next((part.device for part in parts.values()), None)
    return torch.zeros(shape, device=device)
