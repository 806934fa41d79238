"""Merges: one shared vector computed from all task vectors.

`Merge.prepare(family)` takes what must be known of the whole model first (TIES' trim thresholds),
from its own passes over the family, and returns what then merges each tensor: a `MergeTensor`.
`in_blocks` makes one of a function of `(T, n)` entries, where every entry is merged by itself. A
merge that needs no number over the whole model derives from `TensorMerge`, and is one function.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fusionkit.registry import Plugin
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import TaskVectors

MergeTensor = Callable[[TaskVectors], Tensor]
"""The task vectors of one tensor → the shared vector, float32 `(*shape)`, the caller's own."""


class Merge(Plugin, ABC):
    """Base class of merges; a subclass is a frozen dataclass that sets `id`."""

    group: ClassVar[str] = "fusionkit.merges"

    @abstractmethod
    def prepare(self, family: Family) -> MergeTensor:
        """Take what must be known of the whole family, and return what merges its tensors.

        Passes over the family are `Family.each` and `Family.total`. What is returned is called in
        several threads.
        """


class TensorMerge(Merge):
    """Base of merges that need no number over the whole model.

    Attributes:
        elementwise: every entry is merged by itself, so that a tensor may come in flat blocks
            `(T, n)`; False for merges that need a matrix whole.
    """

    elementwise: ClassVar[bool] = True

    @abstractmethod
    def merge(self, vectors: Tensor) -> Tensor:
        """Merge one tensor: float32 `(T, *shape)` → `(*shape)`."""

    def prepare(self, family: Family) -> MergeTensor:
        """Nothing to prepare."""
        return in_blocks(self.merge) if self.elementwise else self._whole

    def _whole(self, vectors: TaskVectors) -> Tensor:
        return self.merge(vectors.stack())


def in_blocks(merge: Callable[[Tensor], Tensor]) -> MergeTensor:
    """Merge a tensor block by block: never are all its task vectors in memory.

    Args:
        merge: merges entries that do not depend on each other: float32 `(T, n)` → `(n,)`.
    """

    def merge_tensor(vectors: TaskVectors) -> Tensor:
        merged = torch.empty(vectors.shape.numel(), device=vectors.device)
        for place, block in vectors.blocks():
            merged[place] = merge(block)
        return merged.view(vectors.shape)

    return merge_tensor
