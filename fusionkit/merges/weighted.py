"""A weighted sum of the task vectors."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fusionkit.errors import CodecError
from fusionkit.merges.base import Merge, MergeTensor, in_blocks
from fusionkit.task_vectors.family import Family


@dataclass(frozen=True)
class Weighted(Merge):
    """Weighted sum of the task vectors: τ* = Σ w_t τ_t; LoraHub's (2307.13269), once searched.

    Args:
        weights: task → its weight; `fusionkit.calibration.lorahub.LoraHub` finds them.

    Raises:
        CodecError: a task of the family has no weight.
    """

    id: ClassVar[str] = "weighted"
    weights: dict[str, float] = field(default_factory=dict)

    def prepare(self, family: Family) -> MergeTensor:
        """Bring the weights into the order of the family's tasks."""
        if missing := [task for task in family.tasks if task not in self.weights]:
            raise CodecError(f"Weighted has no weight of task '{missing[0]}'; add it to `weights`")
        weights = torch.tensor([self.weights[task] for task in family.tasks])
        return in_blocks(lambda vectors: torch.tensordot(weights.to(vectors.device), vectors, 1))
