"""The task vectors of one tensor: what merges and codecs see of a family."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from fusionkit.errors import FamilyError
from fusionkit.lowrank import LowRank
from fusionkit.overlay import MergedAdapter

BLOCK = 1 << 17
"""Entries per block of `TaskVectors.blocks`: small enough for eight tasks to stay in cache."""

Change = Callable[[Tensor, slice], None]
"""Changes one task's vector in place: some of its flattened entries, and their place in it."""


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """The task vectors of one tensor, one per task: θ_t − θ₀ in float32, formed on demand.

    Nothing but the tensors asked for is read or kept: `vectors[t]` forms one task's,
    `stack()` all of them, `blocks()` all of them a block at a time.

    Attributes:
        name: the tensor's name.
        shape: its shape.
        tasks: the tasks' names, in the order of the indices.
        base: the base's tensor as it is, in its own dtype; not to be changed.
    """

    name: str
    shape: torch.Size
    tasks: tuple[str, ...]
    base: Tensor
    _read: Callable[[int], Tensor]
    _label: Callable[[int | None], str]
    _adapter: Callable[[int], MergedAdapter | None]

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, task: int) -> Tensor:
        """One task's vector: float32 `(*shape)`, contiguous, the caller's own.

        Raises:
            FamilyError: it holds a NaN or an infinity.
        """
        delta = self._of_adapter(task)
        if delta is None:
            delta = self._difference(self._read(task))
        self._check_finite(delta, task)
        return delta.contiguous()

    def low_rank(self, task: int) -> LowRank | None:
        """One task's vector as a product of two factors, where an adapter has it as one.

        Raises:
            FamilyError: it holds a NaN or an infinity.
        """
        adapter = self._adapter(task)
        factors = adapter.low_rank(self.name) if adapter else None
        if factors:
            self._check_finite(factors.left, task)
            self._check_finite(factors.right, task)
        return factors

    def tuned(self, task: int) -> Tensor:
        """One task's fine-tuned tensor as it is, in its own dtype; not to be changed.

        Raises:
            FamilyError: it holds a NaN or an infinity.
        """
        tuned = self._read(task)
        self._check_finite(tuned, task)
        return tuned

    def stack(self) -> Tensor:
        """All tasks' vectors: float32 `(T, *shape)`."""
        stacked = torch.empty((len(self), *self.shape))
        for task in range(len(self)):
            stacked[task] = self[task]
        return stacked

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
        """All tasks' vectors, flattened, a block of at most `size` entries at a time.

        Yields:
            the block's place in the flattened tensor, and float32 `(T, n)`; the memory is used
            again for the next block.

        Raises:
            FamilyError: a block holds a NaN or an infinity.
        """
        base = self.base.reshape(-1)
        deltas = [self._of_adapter(task) for task in range(len(self))]
        tuned = [
            self._read(task).reshape(-1) if delta is None else delta.reshape(-1)
            for task, delta in enumerate(deltas)
        ]
        buffer = torch.empty((len(self), min(size, base.numel())))
        for start in range(0, base.numel(), size):
            place = slice(start, min(start + size, base.numel()))
            block = buffer[:, : place.stop - start]
            start_of = base[place].to(torch.float32)
            for task, values in enumerate(tuned):
                if deltas[task] is None:
                    torch.sub(values[place].to(torch.float32), start_of, out=block[task])
                else:
                    block[task] = values[place]
            if not torch.isfinite(block.sum()):
                for task in range(len(self)):
                    self._check_finite(block[task], task)
            yield place, block

    def _difference(self, tuned: Tensor) -> Tensor:
        """τ = θ − θ₀ in float32, in pieces that stay in cache: neither is copied whole."""
        if tuned.dtype == self.base.dtype == torch.float32:
            return torch.sub(tuned, self.base)
        delta = torch.empty(self.shape)
        flat, ours, base = delta.view(-1), tuned.reshape(-1), self.base.reshape(-1)
        for start in range(0, flat.numel(), BLOCK):
            place = slice(start, start + BLOCK)
            torch.sub(ours[place].float(), base[place].float(), out=flat[place])
        return delta

    @cached_property
    def _base(self) -> Tensor:
        return self.base.to(torch.float32)

    def _of_adapter(self, task: int) -> Tensor | None:
        """What an adapter does to the tensor, as it is: no rounding against the base."""
        adapter = self._adapter(task)
        return adapter.delta(self.name, self._base) if adapter else None

    def _check_finite(self, values: Tensor, task: int) -> None:
        # The sum is one cheap pass; only a suspicious one is looked at entry by entry.
        if torch.isfinite(values.sum()) or torch.isfinite(values).all():
            return
        bad = int((~torch.isfinite(values)).sum())
        at_fault = self._label(task if torch.isfinite(self._base).all() else None)
        raise FamilyError(
            f"{at_fault}: tensor '{self.name}' holds {bad} values that are NaN or infinite "
            f"(task '{self.tasks[task]}'); mend or retrain that checkpoint"
        )


@dataclass(frozen=True, eq=False)
class ChangedVectors(TaskVectors):
    """Task vectors that are changed as they are formed: shifted, say, or scaled.

    Attributes:
        changes: per task what is done to its vector; None: it stays as it is, to the bit.
    """

    changes: Sequence[Change | None]

    @classmethod
    def of(cls, vectors: TaskVectors, changes: Sequence[Change | None]) -> "ChangedVectors":
        """The same vectors, changed; changes made before come first."""
        if isinstance(vectors, ChangedVectors):
            changes = [
                _both(first, then) for first, then in zip(vectors.changes, changes, strict=True)
            ]
        own = {field.name: getattr(vectors, field.name) for field in fields(TaskVectors)}
        return cls(**own, changes=changes)

    def __getitem__(self, task: int) -> Tensor:
        """One task's changed vector: float32 `(*shape)`."""
        delta = super().__getitem__(task)
        change = self.changes[task]
        if change is not None:
            change(delta.view(-1), slice(0, delta.numel()))
        return delta

    def low_rank(self, task: int) -> LowRank | None:
        """As of the vectors themselves; None of one that is changed."""
        return None if self.changes[task] else super().low_rank(task)

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
        """As of the vectors themselves, then changed."""
        for place, block in super().blocks(size):
            for change, values in zip(self.changes, block, strict=True):
                if change is not None:
                    change(values, place)
            yield place, block


def _both(first: Change | None, then: Change | None) -> Change | None:
    if first is None or then is None:
        return first or then

    def change(values: Tensor, place: slice) -> None:
        first(values, place)
        then(values, place)

    return change
