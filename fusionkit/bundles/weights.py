"""A task's whole model, one tensor at a time, without holding all of it."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.rounding import rounded
from fusionkit.checkpoints.stacks import row_name, whole_names
from fusionkit.checkpoints.vocabulary import extended
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import WrongBaseError, listing
from fusionkit.task_vectors.task_source import TaskSource, folded_tensor


class Whole(TaskSource, Protocol):
    """A source of tasks with its base at hand: a `Bundle`."""

    codec: DeltaCodec

    @property
    def base(self) -> Checkpoint:
        """The base, its stacks split."""
        ...

    def private(self, task: str) -> list[str]:
        """Names of a task's private tensors."""
        ...

    def private_tensor(self, task: str, name: str) -> Tensor:
        """One of them, in its own dtype."""
        ...


class TaskWeights(Mapping[str, Tensor]):
    """A task's tensors by name, made as they are asked for; tied ones once, stacks whole.

    Args:
        source: gives them.
        task: one of its tasks.
        dtype: of all floating-point tensors; by default the base's own, and of private and
            restored tensors the one that they had.

    Raises:
        BundleError: the source has no such task.
        WrongBaseError: the base at hand is another model.
    """

    def __init__(self, source: Whole, task: str, dtype: torch.dtype | None = None) -> None:
        self._source, self._task, self._dtype = source, task, dtype
        self._private = frozenset(source.private(task))
        self._base, self._initial = source.base, source.initial
        needed = [name for name, role in source.roles.items() if role != "frozen"]
        if lacking := [name for name in needed if name not in self._base]:
            raise WrongBaseError(
                f"{self._base.label} lacks tensors of the base that this bundle was made from:"
                f"{listing(lacking)}"
            )
        own = set(source.space.layout.tensors) if source.space else set()
        self._seen = [name for name in source.roles if name not in own and name in self._base]
        self._names = [*whole_names(self._seen, source.stacks), *sorted(self._private)]

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, rounded once: `(*shape)` on the CPU, the caller's own.

        Raises:
            BundleError: it can't be decoded, or a finite value would be infinite in the dtype.
        """
        if name in self._private:
            tensor = self._source.private_tensor(self._task, name)
            return self._rounded(tensor, name, tensor.dtype)
        count = self._source.stacks.get(name)
        if count is None:
            return self._one(name)
        return torch.stack([self._one(row_name(name, index)) for index in range(count)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # a mapping's own would make the tensor

    def __repr__(self) -> str:
        return f"TaskWeights({self._source.label!r}, {self._task!r}, {len(self)} tensors)"

    @property
    def sizes(self) -> dict[torch.dtype, int]:
        """Bytes by dtype, of the tensors that the base has; nothing is read for it."""
        found: dict[torch.dtype, int] = {}
        for name in self._seen:
            spec = self._base.specs[name]
            dtype = self._dtype if self._dtype and spec.dtype.is_floating_point else spec.dtype
            found[dtype] = found.get(dtype, 0) + spec.numel * dtype.itemsize
        return found

    @cached_property
    def _exact(self) -> dict[str, Tensor]:
        return dict(self._source.exact(self._task))

    def _one(self, name: str) -> Tensor:
        base = self._base[name]
        own = self._exact.get(name)
        if own is None:
            own = folded_tensor(self._source, self._task, name, base, self._initial)
        restored = self._source.codec.restores and self._source.roles[name] == "delta"
        summed = own is not base and name not in self._exact and not restored
        whole = self._rounded(own, name, own.dtype if restored else base.dtype, not summed)
        if name in self._source.added(self._task):
            rows = dict(self._source.added_rows(self._task))[name]
            return extended(whole, self._rounded(rows, name, whole.dtype))
        return whole

    def _rounded(self, tensor: Tensor, name: str, dtype: torch.dtype, copy: bool = True) -> Tensor:
        target = self._dtype if self._dtype and dtype.is_floating_point else dtype
        what = f"{self._source.label}: task '{self._task}': tensor '{name}'"
        return rounded(tensor, target, what, copy=copy)
