"""TIES-Merging (2306.01708)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusionkit.errors import CodecError
from fusionkit.merges.base import Merge, MergeTensor, in_blocks
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.topk import Thresholds


@dataclass(frozen=True)
class TIES(Merge):
    """Trim, elect signs, merge what agrees (Yadav et al., 2306.01708).

    Each task vector keeps its largest magnitudes; per parameter the sign of their sum is elected,
    and only the kept values of that sign are averaged (over those present) or summed.

    Args:
        density: share of each whole task vector that is kept, in (0, 1].
        scale: λ, on the merged vector.
        aggregate: `mean` over the values present (the paper's), or their `sum`.

    Raises:
        CodecError: the density is outside (0, 1].
    """

    id: ClassVar[str] = "ties"
    density: float = 0.2
    scale: float = 1.0
    aggregate: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise CodecError(f"expected TIES' density in (0, 1], got {self.density}")

    def prepare(self, family: Family) -> MergeTensor:
        """Find each task's trim threshold over its whole vector (two passes)."""
        counts = [round(self.density * family.parameters)] * len(family.tasks)
        limits = Thresholds.over(family, counts, ties=False).magnitudes

        def merge(vectors: Tensor) -> Tensor:
            limit = limits.to(vectors.device)[:, None]
            trimmed = torch.where(vectors.abs() >= limit, vectors, 0.0)
            sign = torch.sign(trimmed.sum(0))
            agreed = torch.where(trimmed * sign > 0, trimmed, 0.0)
            merged = agreed.sum(0)
            if self.aggregate == "mean":
                merged /= (agreed != 0).sum(0).clamp_(min=1)
            return merged.mul_(self.scale)

        return in_blocks(merge)
