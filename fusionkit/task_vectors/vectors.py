"""The task vectors of one tensor: what merges and codecs see of a family."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.checkpoints.adapters.merged import MergedAdapter
from fusionkit.checkpoints.checkpoint import Pieces
from fusionkit.errors import FamilyError
from fusionkit.task_vectors import kernels

BLOCK = 1 << 18
"""Entries per block of `TaskVectors.blocks`: few enough to stay in cache, and enough for threads
not to be in each other's way."""
BLOCK_ELSEWHERE = 1 << 23
"""The same on a GPU."""

_RUN = 512
"""Neighbouring entries of a sample."""

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
        device: where they are formed.
    """

    name: str
    shape: torch.Size
    tasks: tuple[str, ...]
    device: torch.device
    _read: Callable[[int | None], Tensor]  # a task's tensor; None: the base's
    _pieces: Callable[[int | None], Pieces]
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
            return self._difference(task)
        delta = delta.to(self.device).contiguous()
        self._check_finite(delta, task)
        return delta

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
            factors = LowRank(*(factor.to(self.device) for factor in factors))
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
        stacked = torch.empty((len(self), *self.shape), device=self.device)
        for task in range(len(self)):
            stacked[task] = self[task]
        return stacked

    def __iter__(self) -> Iterator[Tensor]:
        """Each task's vector, one at a time."""
        return (self[task] for task in range(len(self)))

    def sample(self, count: int) -> Tensor:
        """Some entries of all tasks' vectors, from all over the tensor: float32 `(T, n)`.

        Args:
            count: about how many; all of them, if there are not more.
        """
        total = self.shape.numel()
        runs = [
            block.clone()
            for place, block in self._blocks(_RUN, max(total // count, 1) * _RUN, range(len(self)))
        ]
        return torch.cat(runs, 1) if runs else torch.empty(len(self), 0, device=self.device)

    def blocks(
        self, size: int | None = None, tasks: Sequence[int] | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The tasks' vectors, flattened, a block of at most `size` entries at a time.

        Args:
            size: of a block; by default what suits the device.
            tasks: which tasks' (T of them); by default all.

        Yields:
            the block's place in the flattened tensor, and contiguous float32 `(T, n)`; the
            caller's to change, but used again for the next block.

        Raises:
            FamilyError: a block holds a NaN or an infinity.
        """
        size = size or self._block
        return self._blocks(size, size, range(len(self)) if tasks is None else tasks)

    def _blocks(self, size: int, step: int, tasks: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
        """Blocks that start every `step` entries."""
        base = self._pieces(None)
        deltas = [self._of_adapter(task) for task in tasks]
        tuned = [
            self._pieces(task) if delta is None else delta.reshape(-1).__getitem__
            for task, delta in zip(tasks, deltas, strict=True)
        ]
        width = min(size, self.shape.numel())
        buffer = torch.empty(len(tuned) * width, device=self.device)
        start = torch.empty(width, device=self.device)
        for place in self._places(size, step):
            count = place.stop - place.start
            block = buffer[: len(tuned) * count].view(len(tuned), count)
            before = start[:count].copy_(base(place))
            for row, values, delta, task in zip(block, tuned, deltas, tasks, strict=True):
                if delta is None:
                    self._subtract(values(place), before, row, task)
                else:
                    row.copy_(values(place))
                    self._check_finite(row, task)
            yield place, block

    @property
    def base(self) -> Tensor:
        """The base's tensor as it is, in its own dtype; not to be changed."""
        return self._read(None)

    def _difference(self, task: int) -> Tensor:
        """τ = θ − θ₀ in float32, in pieces that stay in cache: neither is copied whole."""
        delta = torch.empty(self.shape, device=self.device)
        flat, ours, base = delta.view(-1), self._pieces(task), self._pieces(None)
        start = torch.empty(min(self._block, flat.numel()), device=self.device)
        for place in self._places(self._block, self._block):
            piece = flat[place]
            before = start[: len(piece)].copy_(base(place))
            self._subtract(ours(place), before, piece, task)
        return delta

    def _subtract(self, tuned: Tensor, base: Tensor, out: Tensor, task: int) -> None:
        """θ − θ₀ of some entries, into `out`."""
        near = tuned.device == out.device
        if out.device.type != "cpu":
            out.copy_(tuned).sub_(base)
            finite = False  # or not known yet
        elif near and tuned.dtype == torch.bfloat16:
            bits = tuned.view(torch.uint16).numpy()
            finite = kernels.difference_of_bfloat16(bits, base.numpy(), out.numpy())
        else:
            values = tuned if near and tuned.dtype == torch.float32 else out.copy_(tuned)
            finite = kernels.difference(values.numpy(), base.numpy(), out.numpy())
        if not finite:
            self._check_finite(out, task)

    @property
    def _block(self) -> int:
        return BLOCK if self.device.type == "cpu" else BLOCK_ELSEWHERE

    def _places(self, size: int, step: int) -> Iterator[slice]:
        count = self.shape.numel()
        for start in range(0, count, step):
            yield slice(start, min(start + size, count))

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

    def _blocks(self, size: int, step: int, tasks: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
        """As of the vectors themselves, then changed."""
        changes = [self.changes[task] for task in tasks]
        for place, block in super()._blocks(size, step, tasks):
            for change, values in zip(changes, block, strict=True):
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
