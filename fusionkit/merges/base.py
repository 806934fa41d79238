"""Merges: one shared vector computed from all task vectors.

A merge is pure: `(T, *shape)` in, `(*shape)` out, one tensor at a time. One that needs a number
over the whole model first (TIES' trim thresholds) takes it in `prepare`, from its own passes over
the family.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusionkit.codecs.packing import above
from fusionkit.errors import CodecError
from fusionkit.registry import Plugin
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.topk import Thresholds
from fusionkit.task_vectors.vectors import Change, TaskVectors

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


@dataclass(frozen=True)
class Mean(TensorMerge):
    """Average of the task vectors: τ* = (1/T) Σ τ_t, which is weight averaging."""

    id: ClassVar[str] = "mean"

    def merge(self, vectors: Tensor) -> Tensor:
        """(1/T) Σ τ_t."""
        return vectors.mean(0)


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


@dataclass(frozen=True)
class Weighted(Merge):
    """Weighted sum of the task vectors: τ* = Σ w_t τ_t; LoraHub's (2307.13269), once searched.

    Args:
        weights: task → its weight; `fusionkit.reuse.fused.LoraHub` finds them.

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
        return lambda _, vectors: torch.tensordot(weights.to(vectors.device), vectors, 1)


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
                sums += block.square().sum(1).cpu()
            return sums

        total = family.total(squares)
        lengths = torch.zeros(len(family.tasks)) if total is None else total.sqrt()
        ratios = torch.where(lengths > 0, lengths.mean() / lengths, 1.0)
        scales = ratios.pow(self.power).to(torch.float32)
        scaled = family.changed(lambda _: [_scaled(float(scale)) for scale in scales])
        merge_tensor = self.merge.prepare(scaled)

        def merge(name: str, vectors: Tensor) -> Tensor:
            own = scales.to(vectors.device).view(-1, *[1] * (vectors.ndim - 1))
            return merge_tensor(name, vectors * own)

        return merge

    def vector(self, merge_tensor: MergeTensor, vectors: TaskVectors) -> Tensor:
        """As the merge takes a tensor: in blocks, or whole."""
        return self.merge.vector(merge_tensor, vectors)


def _scaled(scale: float) -> Change:
    def change(values: Tensor, place: slice) -> None:
        values.mul_(scale)

    return change


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

        def merge_tensor(_: str, vectors: Tensor) -> Tensor:
            limit = limits.to(vectors.device).view(-1, *[1] * (vectors.ndim - 1))
            trimmed = torch.where(vectors.abs() >= limit, vectors, 0.0)
            sign = torch.sign(trimmed.sum(0))
            agreed = torch.where(trimmed * sign > 0, trimmed, 0.0)
            merged = agreed.sum(0)
            if self.aggregate == "mean":
                merged /= (agreed != 0).sum(0).clamp_(min=1)
            return merged.mul_(self.scale)

        return merge_tensor


@dataclass(frozen=True)
class Elect(TensorMerge):
    """EMR-Merging's elected vector τ_uni alone (Huang et al., 2405.17461)."""

    id: ClassVar[str] = "elect"

    def merge(self, vectors: Tensor) -> Tensor:
        """τ_uni."""
        return elect(vectors)[0]


def elect(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Elect the unified vector: γ = sgn(Σ τ_t), ε = max of |τ_t| over tasks of sign γ, τ_uni = γ ε.

    A sign sum of exactly 0 counts as negative, as in the authors' code.

    Args:
        vectors: float32 `(T, *shape)`.

    Returns:
        τ_uni, float32 `(*shape)`, and the masks, bool `(T, *shape)`: where τ_t ⊙ τ_uni > 0.
    """
    sign = signs(vectors.sum(0))
    aligned = vectors * sign
    return aligned.amax(0).clamp_(min=0.0).mul_(sign), above(aligned, 0)


def signs(values: Tensor) -> Tensor:
    """1 where a value is positive, else −1: float32, of the same shape."""
    # torch.where would take several times as long.
    return above(values, 0).view(torch.uint8).to(torch.float32).mul_(2).sub_(1)
