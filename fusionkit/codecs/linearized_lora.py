"""Linearized LoRA adapters, kept or fused (L-LoRA, Tang et al., 2310.04742)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionkit.codecs.base import DeltaCodec, Encoder, Parts, SharedParts
from fusionkit.codecs.dense import Dense
from fusionkit.codecs.layout import Layout
from fusionkit.codecs.merged import Merged
from fusionkit.codecs.values import ValueDtype
from fusionkit.errors import CodecError
from fusionkit.merges.base import Merge
from fusionkit.task_vectors.family import Family


@dataclass(frozen=True)
class LinearizedLoRA(DeltaCodec):
    """Keep linearized adapters by what they moved, φ_t − φ₀; or fuse them all into one.

    A linearized model is linear in φ, so that merging adapters merges the functions: with B₀ = 0,
    W + s (Σ λ_t B_t) A₀. Then A never moves and costs nothing: a task keeps its B, and the start
    φ₀ is the bundle's, as a seed or once for all tasks. Needs `adapters: modules`, of adapters
    that were trained linearized.

    Args:
        merge: fuse the tasks' adapters by this merge, for all tasks; none: each keeps its own.
        dtype: how values are stored.
    """

    id: ClassVar[str] = "linearized_lora"
    merge: Merge | None = None
    dtype: ValueDtype = "fp16"

    def likely_bytes(self, shapes: Mapping[str, Sequence[int]], tasks: int) -> int | None:
        """As what keeps the adapters, or their merge."""
        return self._codec.likely_bytes(shapes, tasks)

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """The passes that the merge itself needs.

        Raises:
            CodecError: the family's adapters are not reused themselves, or not linearized.
        """
        if family.space is None:
            raise CodecError("LinearizedLoRA keeps adapters themselves: set adapters: modules")
        if not family.space.layout.linearized:
            raise CodecError(
                "LinearizedLoRA is for adapters that were trained linearized (fusionkit fit "
                "--model.method linearized_lora); keep these by Dense, or merge them by Merged"
            )
        return self._codec.prepare(family, shared)

    def layout(self, shape: torch.Size) -> Layout:
        """As of the values, or the merged vector."""
        return self._codec.layout(shape)

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """φ_t − φ₀, or the merged vector."""
        return self._codec.decode(parts, shape)

    @property
    def _codec(self) -> DeltaCodec:
        return Dense(self.dtype) if self.merge is None else Merged(self.merge, self.dtype)
