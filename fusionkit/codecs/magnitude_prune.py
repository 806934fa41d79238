"""Magnitude pruning: PERU-FFT on a merged model, Post-Pruning without one (2310.01886)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log2, prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusionkit.codecs.base import DeltaCodec, Encoded, Encoder, Parts, SharedParts
from fusionkit.codecs.layout import Layout, PartSpec
from fusionkit.codecs.merged import SharedVector, decode_shared, shared_layout, shared_operand
from fusionkit.codecs.operands import Operand, Sparse, Sum
from fusionkit.codecs.packing import decode_positions, encode_positions
from fusionkit.codecs.values import (
    ValueDtype,
    held_values,
    pack_values,
    unpack_values,
    values_bytes,
    values_layout,
)
from fusionkit.errors import CodecError
from fusionkit.merges.base import Merge
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.kept import Kept
from fusionkit.task_vectors.topk import Thresholds, top_k, top_k_of
from fusionkit.task_vectors.vectors import TaskVectors


@dataclass(frozen=True)
class MagnitudePrune(DeltaCodec):
    """Keep the largest magnitudes of each task's delta: θ̂_t = θ* + v̂_t(m), v_t = θ_t − θ*.

    With a merge (task arithmetic in the paper) θ* is the merged model and this is PERU-FFT;
    without, θ* = θ₀ and it is Post-Pruning. v_t is taken against θ* as stored, so that the
    rounding of the shared vector is not lost on the kept entries. The count is exact,
    round(density · P), less only where a delta has fewer non-zeros; of equal magnitudes the
    first win. Nothing is rescaled: an entry that is kept is off by its dtype's rounding, the error
    of the others is the whole v_t.

    Args:
        density: share of the entries that is kept, in [0, 1].
        scope: take the largest over the whole `model` (the paper's reading) or per `tensor`.
        merge: the merge whose vector all tasks share, or none.
        dtype: how the values, the shared vector's included, are stored.

    Raises:
        CodecError: the density is outside [0, 1].
    """

    id: ClassVar[str] = "magnitude_prune"
    cost: ClassVar[str] = (
        "d P (b + log2(1/d) + 1.4) bits, about, at density d in a dtype of b bits; "
        "with a merge, shared by all: b P"
    )
    density: float = 0.1
    scope: Literal["model", "tensor"] = "model"
    merge: Merge | None = None
    dtype: ValueDtype = "fp16"

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise CodecError(f"expected MagnitudePrune's density in [0, 1], got {self.density}")

    def likely_bytes(self, shapes: Mapping[str, Sequence[int]], tasks: int) -> int | None:
        """What is kept of each task, about, and the vector that all share."""
        shared = values_bytes(shapes, self.dtype) if self.merge else 0
        if not self.density:
            return shared
        bits = 8 * values_bytes(shapes, self.dtype) / max(sum(map(prod, shapes.values())), 1)
        kept = sum(self.density * prod(shape) for shape in shapes.values())
        return shared + round(tasks * kept * (bits - log2(self.density) + 1.4) / 8)

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """What the merge needs; over the whole model, two or three passes for the thresholds."""
        vector = SharedVector(self.merge, self.dtype, family, shared)
        thresholds = None
        if self.scope == "model":
            counts = [round(self.density * family.parameters)] * len(family.tasks)

            def residuals(vectors: TaskVectors) -> Iterator[Tensor]:
                return _residuals(vectors, vector.of(vectors).values)

            thresholds = Thresholds.over(family, counts, residuals if self.merge else None)

        def encode(vectors: TaskVectors) -> Encoded:
            merged = vector.of(vectors)
            kept = self._kept(vectors, merged.values, thresholds)
            own = [self._coded(each, vectors.shape.numel()) for each in kept]
            return Encoded(vectors.name, merged.parts, own)

        return Encoder(encode)

    def layout(self, shape: torch.Size) -> Layout:
        """The shared vector, the positions, and the values there."""
        return {
            **shared_layout(shape, self.dtype),
            "positions": PartSpec(torch.uint8, (None,)),
            **values_layout((None,), self.dtype),
        }

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """τ* + v̂_t."""
        delta = decode_shared(parts, shape, self.dtype).view(-1)
        if "positions" in parts:
            positions = decode_positions(parts["positions"], delta.numel())
            values = unpack_values(parts, positions.numel(), self.dtype)
            if self.merge is not None:
                values += delta[positions]
            delta[positions] = values
        return delta.view(shape)

    def operand(self, parts: Parts, shape: torch.Size) -> Operand | None:
        """The kept values at their positions, and the shared vector beside them."""
        shared = shared_operand(parts, shape, self.dtype)
        if "positions" not in parts:
            return shared
        positions = decode_positions(parts["positions"], shape.numel())
        own = Sparse.of(positions, held_values(parts, len(positions), self.dtype), shape)
        return own if shared is None else Sum((shared, own))

    def _kept(
        self, vectors: TaskVectors, merged: Tensor | None, thresholds: Thresholds | None
    ) -> Iterator[Kept]:
        """Per task the entries that are kept."""
        count = round(self.density * vectors.shape.numel())
        if merged is None:
            yield from thresholds.of(vectors) if thresholds else top_k_of(vectors, count)
            return
        for task, residual in enumerate(_residuals(vectors, merged)):
            if thresholds is None:
                positions = top_k(residual, count)
            else:
                positions = thresholds.positions(residual, task, vectors.name)
            yield Kept(positions, residual.view(-1)[positions])

    def _coded(self, kept: Kept, total: int) -> Parts:
        if not len(kept.positions):
            return {}
        packed = pack_values(kept.values, self.dtype)
        if self.dtype == "fp32":  # else they are converted, and so copied
            packed = {part: values.clone() for part, values in packed.items()}
        return {"positions": encode_positions(kept.positions, total), **packed}


def _residuals(vectors: TaskVectors, merged: Tensor | None) -> Iterator[Tensor]:
    for vector in vectors:
        yield vector if merged is None else vector.sub_(merged)
