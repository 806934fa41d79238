"""The mean of the task vectors."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusionkit.merges.base import TensorMerge


@dataclass(frozen=True)
class Mean(TensorMerge):
    """Average of the task vectors: τ* = (1/T) Σ τ_t, which is weight averaging."""

    id: ClassVar[str] = "mean"

    def merge(self, vectors: Tensor) -> Tensor:
        """(1/T) Σ τ_t."""
        return vectors.mean(0)
