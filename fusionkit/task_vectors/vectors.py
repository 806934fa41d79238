"""The task vectors of one tensor: what merges and codecs see of a family."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.checkpoints.checkpoint import Checkpoint, Pieces
from fusionkit.checkpoints.rounding import lost, narrows, wider
from fusionkit.checkpoints.stacks import whole_name
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


@dataclass(frozen=True)
class Located:
    """A tensor where it is: in a checkpoint, under the name that it has there.

    Attributes:
        checkpoint: the checkpoint.
        name: its name in it.
    """

    checkpoint: Checkpoint
    name: str

    def read(self) -> Tensor:
        """The tensor as it is, in its own dtype; not to be changed."""
        return self.checkpoint[self.name]

    def pieces(self) -> Pieces:
        """The same, to be read piece by piece."""
        return self.checkpoint.pieces(self.name)


class TaskVectors:
    """The task vectors of one tensor, one per task: θ_t − θ₀ in float32, formed on demand.

    Nothing but the tensors asked for is read or kept: `vectors[t]` forms one task's,
    `stack()` all of them, `blocks()` all of them a block at a time.

    Args:
        base_at: where the base's tensor is.
        tuned_at: task → where its fine-tuned tensor is.
        device: where the vectors are formed.

    Attributes:
        name: the tensor's name.
        shape: its shape.
        tasks: the tasks' names, in the order of the indices.
        device: see above.
        base_at: see above.
        tuned_at: see above.
    """

    def __init__(
        self, base_at: Located, tuned_at: Mapping[str, Located], device: torch.device
    ) -> None:
        self.base_at, self.tuned_at, self.device = base_at, tuned_at, device
        self.name = base_at.name
        self.shape = torch.Size(base_at.checkpoint.specs[base_at.name].shape)
        self.tasks = tuple(tuned_at)

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
        at = self._at(task)
        factors = at.checkpoint.low_rank(at.name)
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
        tuned = self._at(task).read()
        if not is_finite(tuned):
            bad = ~torch.isfinite(tuned) & ~unmoved(tuned, self.base.to(tuned.device))
            if bad.any():
                raise self._not_finite(tuned.masked_fill(~bad, 0), task)
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
        step = max(self.shape.numel() // count, 1) * _RUN
        runs = [block.clone() for _, block in self.blocks(_RUN, step=step)]
        return torch.cat(runs, 1) if runs else torch.empty(len(self), 0, device=self.device)

    def blocks(
        self,
        size: int | None = None,
        tasks: Sequence[int] | None = None,
        step: int | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """The tasks' vectors, flattened, a block of at most `size` entries at a time.

        Args:
            size: of a block; by default what suits the device.
            tasks: which tasks' (T of them); by default all.
            step: how many entries after another a block starts; by default where that one ends.

        Yields:
            the block's place in the flattened tensor, and contiguous float32 `(T, n)`; the
            caller's to change, but used again for the next block.

        Raises:
            FamilyError: a block holds a NaN or an infinity.
        """
        size = size or self._block
        tasks = range(len(self)) if tasks is None else tasks
        base = self.base_at.pieces()
        deltas = [self._of_adapter(task) for task in tasks]
        tuned = [
            self._at(task).pieces() if delta is None else delta.reshape(-1).__getitem__
            for task, delta in zip(tasks, deltas, strict=True)
        ]
        width = min(size, self.shape.numel())
        buffer = torch.empty(len(tuned) * width, device=self.device)
        start = torch.empty(width, device=self.device)
        for place in self._places(size, step or size):
            count = place.stop - place.start
            block = buffer[: len(tuned) * count].view(len(tuned), count)
            stored = base(place)
            before = start[:count].copy_(stored)
            for row, values, delta, task in zip(block, tuned, deltas, tasks, strict=True):
                if delta is None:
                    self._subtract(values(place), stored, before, row, task)
                else:
                    row.copy_(values(place))
                    self._check_finite(row, task)
            yield place, block

    @property
    def base(self) -> Tensor:
        """The base's tensor as it is, in its own dtype; not to be changed."""
        return self.base_at.read()

    def _difference(self, task: int) -> Tensor:
        """τ = θ − θ₀ in float32, in pieces that stay in cache: neither is copied whole."""
        delta = torch.empty(self.shape, device=self.device)
        flat, ours, base = delta.view(-1), self._at(task).pieces(), self.base_at.pieces()
        start = torch.empty(min(self._block, flat.numel()), device=self.device)
        for place in self._places(self._block, self._block):
            piece = flat[place]
            stored = base(place)
            before = start[: len(piece)].copy_(stored)
            self._subtract(ours(place), stored, before, piece, task)
        return delta

    def _subtract(
        self, tuned: Tensor, stored: Tensor, base: Tensor, out: Tensor, task: int
    ) -> None:
        """θ − θ₀ of some entries, into `out`; `base` is `stored` in float32, on its device."""
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
        if not finite and not _is_small(out):
            same = unmoved(tuned, stored.to(tuned.device)).to(out.device)
            if not _is_small(out.masked_fill_(same, 0)):
                raise self._not_finite(out, task)
        if narrows(tuned.dtype, stored.dtype) and (magnitude := float(lost(tuned, stored.dtype))):
            raise self._out_of_range(magnitude, stored.dtype, task)

    @property
    def _block(self) -> int:
        return BLOCK if self.device.type == "cpu" else BLOCK_ELSEWHERE

    def _places(self, size: int, step: int) -> Iterator[slice]:
        count = self.shape.numel()
        for start in range(0, count, step):
            yield slice(start, min(start + size, count))

    def _at(self, task: int) -> Located:
        return self.tuned_at[self.tasks[task]]

    def _of_adapter(self, task: int) -> Tensor | None:
        """What an adapter does to the tensor, as it is: no rounding against the base."""
        at = self._at(task)
        return at.checkpoint.delta(at.name)

    def _check_finite(self, values: Tensor, task: int) -> None:
        """Check what an adapter says; there is no base in it that could be as it is."""
        if not _is_small(values):
            bad = int((~torch.isfinite(values)).sum())
            holds = f"{bad} values that are NaN or infinite" if bad else _too_large(values)
            raise FamilyError(
                f"{self._at(task).checkpoint.label}: tensor '{self.name}' holds {holds} "
                f"(task '{self.tasks[task]}'); mend or retrain that adapter"
            )

    def _not_finite(self, values: Tensor, task: int) -> FamilyError:
        """The error that a delta is not finite, and base and fine-tuned model are not the same.

        Args:
            values: some of it, or of the fine-tuned tensor; or finite, and too large to work with.
            task: whose it is.
        """
        bad = int((~torch.isfinite(values)).sum())
        label, base = self._at(task).checkpoint.label, self.base_at.checkpoint.label
        holds = f"holds {bad} values that are NaN or infinite (task '{self.tasks[task]}')"
        retrain = "mend or retrain that checkpoint"
        if not is_finite(self._at(task).read()):
            found = f"{label}: tensor '{self.name}' {holds}, where the base holds others"
        elif not is_finite(self.base):
            found = f"{base} (the base): tensor '{self.name}' {holds}, where {label} does not"
        else:
            found, retrain = (
                f"{label}: tensor '{self.name}' differs from the base's by {_too_large(values)} "
                f"(task '{self.tasks[task]}')",
                "",
            )
        whole = whole_name(self.base_at.checkpoint, self.name)
        private = f"declare '{whole}' private to store it whole"
        if self.name not in self.base_at.checkpoint.plain:  # an adapter's own, and never private
            private = ""
        elif retrain:
            private = f"or, if they are meant, {private}"
        return FamilyError("; ".join(filter(None, [found, retrain, private])))

    def _out_of_range(self, magnitude: float, dtype: torch.dtype, task: int) -> FamilyError:
        """The error that a fine-tuned tensor's values are infinite in the base's dtype."""
        base = self.base_at.checkpoint.label
        return FamilyError(
            f"{self._at(task).checkpoint.label}: tensor '{self.name}' reaches {magnitude:.6g} "
            f"(task '{self.tasks[task]}'), which would be infinite in the base's dtype, "
            f"{str(dtype).removeprefix('torch.')}; convert the base {base} to {wider(magnitude)}"
        )


def difference(tuned: Tensor, base: Tensor) -> Tensor:
    """θ − θ₀: float32, 0 where neither is finite and both are the same."""
    delta = tuned.to(torch.float32) - base.to(torch.float32)
    return delta if is_finite(delta) else delta.masked_fill_(unmoved(tuned, base), 0)


def unmoved(tuned: Tensor, base: Tensor) -> Tensor:
    """Where neither of two tensors is finite, and both are the same: bool, of their shape.

    A mask of −∞ is such, and what observers hold before they have seen anything.
    """
    ours, theirs = tuned.to(torch.float64), base.to(torch.float64)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return same & ~ours.isfinite()


def _is_small(values: Tensor) -> bool:
    """Whether there is room for sums of such values in float32; not, where one isn't finite."""
    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return bool(max(-float(low), float(high)) < kernels.LIMIT)  # NaN of any: not


def _too_large(values: Tensor) -> str:
    """What is said of values that are not small."""
    finite = values[values.isfinite()].abs()
    reached = f"up to {float(finite.max()):.3g}, which is" if finite.numel() else "what is"
    return f"{reached} more than the {kernels.LIMIT:.2g} that float32 has room to add up"


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # The sum is one cheap pass; only a suspicious one is looked at entry by entry.
    of_half = torch.float32 if values.dtype == torch.float16 else None
    return bool(torch.isfinite(values.sum(dtype=of_half)) or torch.isfinite(values).all())


class ChangedVectors(TaskVectors):
    """Task vectors that are changed as they are formed: shifted, say, or scaled.

    Args:
        vectors: the vectors before; what was done to them comes first.
        changes: per task what is done to its vector; None: it stays as it is, to the bit.

    Attributes:
        vectors: see above.
        changes: see above.
    """

    def __init__(self, vectors: TaskVectors, changes: Sequence[Change | None]) -> None:
        super().__init__(vectors.base_at, vectors.tuned_at, vectors.device)
        self.vectors, self.changes = vectors, changes

    def __getitem__(self, task: int) -> Tensor:
        """One task's changed vector: float32 `(*shape)`."""
        delta = self.vectors[task]
        change = self.changes[task]
        if change is not None:
            change(delta.view(-1), slice(0, delta.numel()))
        return delta

    def low_rank(self, task: int) -> LowRank | None:
        """As of the vectors before; None of one that is changed."""
        return None if self.changes[task] else self.vectors.low_rank(task)

    def blocks(
        self,
        size: int | None = None,
        tasks: Sequence[int] | None = None,
        step: int | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """As of the vectors before, then changed."""
        changes = self.changes if tasks is None else [self.changes[task] for task in tasks]
        for place, block in self.vectors.blocks(size, tasks, step):
            for change, values in zip(changes, block, strict=True):
                if change is not None:
                    change(values, place)
            yield place, block
