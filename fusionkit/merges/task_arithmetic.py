"""Task arithmetic (2212.04089)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusionkit.merges.base import TensorMerge


@dataclass(frozen=True)
class TaskArithmetic(TensorMerge):
    """Scaled sum of the task vectors: τ* = λ Σ τ_t (Ilharco et al., 2212.04089).

    Args:
        scale: λ; 0.3 is the usual value for eight vision tasks.
    """

    id: ClassVar[str] = "task_arithmetic"
    scale: float = 0.3

    def merge(self, vectors: Tensor) -> Tensor:
        """The sum, scaled."""
        return vectors.sum(0).mul_(self.scale)
