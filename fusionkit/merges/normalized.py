"""Another merge, of vectors brought towards one length."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fusionkit.merges.base import Merge, MergeTensor
from fusionkit.merges.mean import Mean
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import Change, ChangedVectors, TaskVectors


@dataclass(frozen=True)
class Normalized(Merge):
    """Another merge, of task vectors that are first brought towards one length.

    A task that was trained harder, or for longer, moves further from the base and would dominate
    a sum. Over the whole model, each vector becomes τ_t · (n / ‖τ_t‖)^p, where n is the mean of
    their lengths.

    Args:
        merge: what then merges them.
        power: p; 1 makes all of one length, 0 changes nothing.
    """

    id: ClassVar[str] = "normalized"
    merge: Merge = field(default_factory=Mean)
    power: float = 1.0

    def prepare(self, family: Family) -> MergeTensor:
        """One pass for the lengths, then those of the merge."""

        def squares(vectors: TaskVectors) -> Tensor:
            sums = torch.zeros(len(vectors), dtype=torch.float64)
            for _, block in vectors.blocks():
                sums += block.to(torch.float64).square_().sum(1).cpu()  # squares may overflow
            return sums

        total = family.total(squares)
        lengths = torch.zeros(len(family.tasks)) if total is None else total.sqrt()
        ratios = torch.where(lengths > 0, lengths.mean() / lengths, 1.0)
        scales = ratios.pow(self.power).to(torch.float32)
        changes = [_scaled(float(scale)) for scale in scales]
        merge_tensor = self.merge.prepare(family.changed(lambda _: changes))
        return lambda vectors: merge_tensor(ChangedVectors(vectors, changes))


def _scaled(scale: float) -> Change:
    def change(values: Tensor, place: slice) -> None:
        values.mul_(scale)

    return change
