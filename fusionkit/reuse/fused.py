"""Several tasks fused into one model, in memory; and the search for the weights to fuse them by."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.layout import fold_into
from fusionkit.merges.base import Merge
from fusionkit.task_vectors.family import Family


class Fused:
    """A family merged into one model: every task is that model, with the task's own head.

    Args:
        family: the tasks.
        merge: how their vectors become one.

    Attributes:
        tasks: the tasks' names.
        vectors: tensor's name → the merged vector, float32 `(*shape)`.
    """

    def __init__(self, family: Family, merge: Merge) -> None:
        self.family = family
        self.tasks = family.tasks
        merge_tensor = merge.prepare(family)
        self.vectors = {each.name: merge_tensor(each) for each in family}
        self.scale = 1.0

    @property
    def written(self) -> list[str]:
        """Names of the tensors that `write_into` writes."""
        return self.family.written

    def write_into(self, task: str, base: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
        """Write the fused weights into `out`, all but private and frozen ones."""
        space = self.family.space
        own = set(space.layout.tensors) if space else set()
        for name in self.vectors.keys() - own:
            out[name].copy_(torch.add(base[name].to(torch.float32), self._vector(name, base[name])))
        moved = dict(self.family.exact(task))
        for name in self.family.names("exact"):
            if name in out:  # unless it is a buffer that this model does not save
                out[name].copy_(moved.get(name, base[name]))
        if space:
            start = self.family.base
            fold_into(
                space.layout,
                lambda name, device: self._moved(name, start[name]).to(device),
                lambda name, device: start[name].to(device),
                base,
                out,
            )

    def private_tensors(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The task's private tensors."""
        return self.family.private_tensors(task)

    def _moved(self, name: str, start: Tensor) -> Tensor:
        """An adapter's tensor; what never moves has no vector."""
        return start + self._vector(name, start) if name in self.vectors else start

    def _vector(self, name: str, like: Tensor) -> Tensor:
        return self.vectors[name].to(like.device) * self.scale
