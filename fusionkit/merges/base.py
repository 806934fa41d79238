"""Merges: one shared vector computed from all task vectors.

A merge is pure: `(T, *shape)` in, `(*shape)` out, one tensor at a time. One that needs a number
over the whole model first (TIES' trim thresholds) takes it in `prepare`, from its own passes over
the family.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fusionkit.registry import Plugin
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import TaskVectors

MergeTensor = Callable[[str, Tensor], Tensor]
"""A tensor's name and its task vectors `(T, *shape)` → the shared vector `(*shape)`, float32."""


class Merge(Plugin, ABC):
    """Base class of merges; a subclass is a frozen dataclass that sets `id`.

    Attributes:
        elementwise: every entry is merged by itself, so that a tensor may come in flat blocks
            `(T, n)`; False for merges that need a matrix whole.
    """

    group: ClassVar[str] = "fusionkit.merges"
    elementwise: ClassVar[bool] = True

    @abstractmethod
    def prepare(self, family: Family) -> MergeTensor:
        """Take what must be known of the whole family, and return the merge of one tensor.

        Passes over the family are `Family.each` and `Family.total`. What is returned is called in
        several threads.
        """

    def vector(self, merge_tensor: MergeTensor, vectors: TaskVectors) -> Tensor:
        """The shared vector of one tensor: float32 `(*shape)`."""
        if not self.elementwise:
            return merge_tensor(vectors.name, vectors.stack())
        merged = torch.empty(vectors.shape.numel(), device=vectors.device)
        for place, block in vectors.blocks():
            merged[place] = merge_tensor(vectors.name, block)
        return merged.view(vectors.shape)


class TensorMerge(Merge):
    """Base of merges that need no number over the whole model."""

    @abstractmethod
    def merge(self, vectors: Tensor) -> Tensor:
        """Merge one tensor: float32 `(T, *shape)` → `(*shape)`."""

    def prepare(self, family: Family) -> MergeTensor:
        """Nothing to prepare."""
        return lambda _, vectors: self.merge(vectors)
