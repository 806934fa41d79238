"""A task's whole model, one tensor at a time: what exports write, without holding all of it."""

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.reader import decoding
from fusionkit.checkpoints.rounding import rounded
from fusionkit.checkpoints.stacks import row_name, whole_names
from fusionkit.checkpoints.vocabulary import extended
from fusionkit.codecs.base import WHOLE
from fusionkit.errors import WrongBaseError, listing
from fusionkit.task_vectors.task_source import folded_tensor


class TaskWeights(Mapping[str, Tensor]):
    """A task's tensors by name, made as they are asked for; tied ones once, stacks whole.

    Args:
        bundle: the bundle, its base at hand.
        task: one of its tasks.
        dtype: of all floating-point tensors; by default the base's own, and of private and
            restored tensors the one that they had.

    Raises:
        BundleError: the bundle has no such task.
        WrongBaseError: the base at hand is another model.
    """

    def __init__(self, bundle: Bundle, task: str, dtype: torch.dtype | None = None) -> None:
        bundle.check([task])
        self._bundle, self._task, self._dtype = bundle, task, dtype
        self._base, self._initial = bundle.base, bundle.initial
        needed = [name for name, role in bundle.roles.items() if role != "frozen"]
        if lacking := [name for name in needed if name not in self._base]:
            raise WrongBaseError(
                f"{self._base.label} lacks tensors of the base that this bundle was made from "
                f"({bundle.manifest.base.source}):{listing(lacking)}"
            )
        own = set(bundle.space.layout.tensors) if bundle.space else set()
        seen = [name for name in bundle.roles if name not in own and name in self._base]
        self._private = frozenset(bundle.manifest.tasks[task].private)
        self._names = [*whole_names(seen, bundle.stacks), *sorted(self._private)]

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, rounded once: `(*shape)` on the CPU.

        Raises:
            BundleError: it can't be decoded, or does not fit into the dtype.
        """
        if name in self._private:
            with decoding(self._bundle.path, self._task, name, self._bundle.codec):
                tensor = self._bundle.task_parts(self._task, name)[WHOLE]
            return self._rounded(tensor, name, tensor.dtype)
        count = self._bundle.stacks.get(name)
        if count is None:
            return self._one(name)
        return torch.stack([self._one(row_name(name, index)) for index in range(count)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def _exact(self) -> dict[str, Tensor]:
        return dict(self._bundle.exact(self._task))

    def _one(self, name: str) -> Tensor:
        base = self._base[name]
        own = self._exact.get(name)
        if own is None:
            own = folded_tensor(self._bundle, self._task, name, base, self._initial)
        restored = self._bundle.codec.restores and self._bundle.roles[name] == "delta"
        whole = self._rounded(own, name, own.dtype if restored else base.dtype)
        if name in self._bundle.added(self._task):
            rows = dict(self._bundle.added_rows(self._task))[name]
            return extended(whole, self._rounded(rows, name, whole.dtype))
        return whole

    def _rounded(self, tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        target = self._dtype if self._dtype and dtype.is_floating_point else dtype
        return rounded(
            tensor, target, f"{self._bundle.label}: task '{self._task}': tensor '{name}'"
        )
