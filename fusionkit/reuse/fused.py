"""Several tasks fused into one model, in memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.modules import AdapterSpace
from fusionkit.merges.base import Merge
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.roles import Role


class Fused:
    """A family merged into one model: every task is that model, with the task's own head.

    Args:
        family: the tasks.
        merge: how their vectors become one.

    Attributes:
        tasks: the tasks' names.
        vectors: tensor's name → the merged vector, float32 `(*shape)`.
        scale: what the vectors are multiplied by; may be changed.
    """

    def __init__(self, family: Family, merge: Merge) -> None:
        self.family = family
        self.tasks = family.tasks
        merge_tensor = merge.prepare(family)
        self.vectors = {each.name: merge_tensor(each) for each in family}
        self.scale = 1.0

    @property
    def label(self) -> str:
        """The family's."""
        return self.family.label

    @property
    def roles(self) -> dict[str, Role]:
        """The family's."""
        return self.family.roles

    @property
    def stacks(self) -> dict[str, int]:
        """The family's."""
        return self.family.stacks

    @property
    def tied(self) -> dict[str, str]:
        """The family's."""
        return self.family.tied

    @property
    def rename(self) -> dict[str, str]:
        """The family's."""
        return self.family.rename

    @property
    def space(self) -> AdapterSpace | None:
        """The family's."""
        return self.family.space

    @property
    def initial(self) -> dict[str, Tensor]:
        """The family's."""
        return self.family.initial

    @property
    def version(self) -> float:
        """What the model depends on beside the family and the merge: the scale."""
        return self.scale

    def tensor(self, task: str, name: str, base: Tensor, out: Tensor | None = None) -> Tensor:
        """Base plus merged vector, in float32; see `TaskSource`."""
        vector = self.vectors[name].to(base.device) * self.scale
        return torch.add(base.to(torch.float32), vector, out=out)

    def exact(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The task's own exact tensors."""
        return self.family.exact(task)

    def private_tensors(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The task's private tensors."""
        return self.family.private_tensors(task)

    def added(self, task: str) -> dict[str, int]:
        """The tensors that the task added rows to."""
        return self.family.added(task)

    def added_rows(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The rows that the task added to the vocabulary."""
        return self.family.added_rows(task)


class Untuned(Fused):
    """A family's base: every task is that, with the task's own head and exact tensors.

    Args:
        family: the tasks.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.tasks = family.tasks
        self.vectors = {}
        self.scale = 0.0

    def tensor(self, task: str, name: str, base: Tensor, out: Tensor | None = None) -> None:  # type: ignore[override]
        """The base's; see `TaskSource`."""
