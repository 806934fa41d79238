"""Whole deltas, only rounded: the yardstick that compressing codecs are measured against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionkit.codecs.base import Parts, TensorCodec
from fusionkit.codecs.layout import Layout
from fusionkit.codecs.values import (
    ValueDtype,
    pack_values,
    unpack_values,
    values_bytes,
    values_layout,
)


@dataclass(frozen=True)
class Dense(TensorCodec):
    """Keep every value of every delta, in a chosen dtype: off by its rounding alone.

    Args:
        dtype: how the values are stored.
    """

    id: ClassVar[str] = "dense"
    cost: ClassVar[str] = "b P bits in a dtype of b bits"
    dtype: ValueDtype = "fp16"

    def likely_bytes(self, shapes: Mapping[str, Sequence[int]], tasks: int) -> int | None:
        """Every value, of every task."""
        return tasks * values_bytes(shapes, self.dtype)

    def encode_tensor(self, delta: Tensor, name: str) -> Parts:
        """The values; none where the delta is zero throughout."""
        return pack_values(delta.reshape(-1), self.dtype) if delta.any() else {}

    def layout(self, shape: torch.Size) -> Layout:
        """The values."""
        return values_layout((shape.numel(),), self.dtype)

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """The values in their shape."""
        return unpack_values(parts, shape.numel(), self.dtype).view(shape)
