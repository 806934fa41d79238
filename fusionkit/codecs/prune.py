"""Magnitude pruning: PERU-FFT on a merged model, Post-Pruning without one (2310.01886)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusionkit.codec import DeltaCodec, Encoded, Parts, SharedParts
from fusionkit.codecs.merged import SharedVector, decode_shared
from fusionkit.errors import CodecError
from fusionkit.family import Family
from fusionkit.merge import Merge
from fusionkit.packing import decode_positions, encode_positions
from fusionkit.task_vectors import TaskVectors
from fusionkit.topk import Thresholds, top_k
from fusionkit.values import ValueDtype, pack_values, unpack_values


@dataclass(frozen=True)
class MagnitudePrune(DeltaCodec):
    """Keep the largest magnitudes of each task's delta: θ̂_t = θ* + v̂_t(m), v_t = θ_t − θ*.

    With a merge (task arithmetic in the paper) θ* is the merged model and this is PERU-FFT;
    without, θ* = θ₀ and it is Post-Pruning. v_t is taken against θ* as stored, so that the
    rounding of the shared vector is not lost on the kept entries. The count is exact,
    round(density · P), less only where a delta has fewer non-zeros; of equal magnitudes the
    first win. Nothing is rescaled.

    Args:
        density: share of the entries that is kept, in [0, 1].
        scope: take the largest over the whole `model` (the paper's reading) or per `tensor`.
        merge: the merge whose vector all tasks share, or none.
        dtype: how the values, the shared vector's included, are stored.

    Raises:
        CodecError: the density is outside [0, 1].
    """

    id: ClassVar[str] = "magnitude_prune"
    density: float = 0.1
    scope: Literal["model", "tensor"] = "model"
    merge: Merge | None = None
    dtype: ValueDtype = "fp16"

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise CodecError(f"expected MagnitudePrune's density in [0, 1], got {self.density}")

    def encode(self, family: Family, shared: SharedParts | None = None) -> Iterator[Encoded]:
        """One pass per tensor; over the whole model, two passes more to find the thresholds."""
        vector = SharedVector(self.merge, self.dtype, family, shared)
        thresholds = None
        if self.scope == "model":
            counts = [round(self.density * family.parameters)] * len(family.tasks)
            thresholds = Thresholds.over(
                lambda: (_residuals(v, vector.of(v).values) for v in family), counts
            )
        for vectors in family:
            merged = vector.of(vectors)
            own = [
                self._prune(residual, t, thresholds)
                for t, residual in enumerate(_residuals(vectors, merged.values))
            ]
            yield Encoded(vectors.name, merged.parts, own)

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

    def _prune(self, residual: Tensor, task: int, thresholds: Thresholds | None) -> Parts:
        if thresholds is None:
            positions = top_k(residual, round(self.density * residual.numel()))
        else:
            positions = thresholds.positions(residual, task)
        if not positions.numel():
            return {}
        kept = residual.view(-1)[positions]
        return {
            "positions": encode_positions(positions, residual.numel()),
            **pack_values(kept, self.dtype),
        }


def _residuals(vectors: TaskVectors, merged: Tensor | None) -> Iterable[Tensor]:
    for task in range(len(vectors)):
        yield vectors[task] if merged is None else vectors[task].sub_(merged)
