"""What a task does to a model's tensors, in a form that a layer can use on some of its rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.adapters.kinds import LoraModule
from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.rounding import rounded
from fusionkit.checkpoints.stacks import row_name
from fusionkit.checkpoints.vocabulary import extended
from fusionkit.task_vectors.task_source import folded_tensor


class Whole(NamedTuple):
    """The tensor itself, as the task has it, whatever its shape."""

    tensor: Tensor


Operand = LowRank | Whole
"""How a layer has a task's tensor: the base's and a product beside it, or the tensor itself."""


@dataclass(frozen=True)
class Target:
    """One of a model's tensors, as its layer is to have it.

    Attributes:
        dtype: of the model's tensor.
        device: where it is.
        as_product: whether the layer can do with the base's and a product beside it.
    """

    dtype: torch.dtype
    device: torch.device
    as_product: bool


class TaskOperands:
    """All that a task changes.

    Args:
        operands: by the model's own name of the tensor.
        record: what the bundle said of the task as they were read.

    Attributes:
        operands: as given.
        record: as given.
        nbytes: of all of it.
    """

    def __init__(self, operands: Mapping[str, Operand], record: object = None) -> None:
        self.operands, self.record = dict(operands), record
        tensors = {id(t): t for each in self.operands.values() for t in each}
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())


def read(
    bundle: Bundle, task: str, base: Checkpoint, target: Callable[[str], Target]
) -> dict[str, Operand]:
    """Read a task's operands from its bundle.

    Args:
        bundle: the bundle.
        task: one of its tasks.
        base: the base's tensors by the bundle's names, stacks split; in the dtype that they had.
        target: the bundle's name of a tensor, a stack's whole → what the model has of it.

    Returns:
        operand by the bundle's name, a stack's whole.

    Raises:
        BundleError: a file was changed, or a value is too large for the model's dtype.
    """
    return dict(_Reader(bundle, task, base, target).all())


class _Reader:
    def __init__(
        self, bundle: Bundle, task: str, base: Checkpoint, target: Callable[[str], Target]
    ) -> None:
        self._bundle, self._task, self._base, self._target = bundle, task, base, target
        self._exact = dict(bundle.exact(task))
        self._added = dict(bundle.added_rows(task))
        self._rows = {
            row_name(stack, i): stack for stack, n in bundle.stacks.items() for i in range(n)
        }

    def all(self) -> Iterator[tuple[str, Operand]]:
        bundle = self._bundle
        adapters = set(bundle.space.layout.tensors) if bundle.space else set()
        for name in bundle.roles:
            if name in adapters or name in self._rows or name not in self._base:
                continue
            if (operand := self._one(name)) is not None:
                yield name, operand
        for stack in bundle.stacks:
            if (tensor := self._stack(stack)) is not None:
                yield stack, self._whole(stack, tensor)
        for name, tensor in bundle.private_tensors(self._task):
            yield name, self._whole(name, tensor)

    def _one(self, name: str) -> Operand | None:
        if name not in self._added and self._target(name).as_product:
            product = self._product(name)
            if product is not None:
                return LowRank(*(self._rounded(name, factor) for factor in product))
        base = self._base[name]
        own = self._tensor(name, base)
        if name in self._added:
            own = extended(own, self._added[name])
        return None if own is base else self._whole(name, own)

    def _tensor(self, name: str, base: Tensor) -> Tensor:
        """A tensor of the base's size; the base's own where the task does not change it."""
        if name in self._exact:
            return self._exact[name]
        return folded_tensor(self._bundle, self._task, name, base, self._bundle.initial)

    def _product(self, name: str) -> LowRank | None:
        bundle = self._bundle
        module = bundle.space.layout.by_target.get(name) if bundle.space else None
        if isinstance(module, LoraModule) and name == module.targets[0]:
            if bundle.roles[name] == "delta":
                return None
            tensors = {n: bundle.initial[n] for n in module.tensors}
            own = {n: folded_tensor(bundle, self._task, n, t, {}) for n, t in tensors.items()}
            return module.low_rank(own, tensors)
        if module is not None or bundle.roles[name] != "delta":
            return None
        return bundle.factors(self._task, name)

    def _stack(self, stack: str) -> Tensor | None:
        count = self._bundle.stacks[stack]
        names = [row_name(stack, index) for index in range(count)]
        bases = [self._base[name] for name in names]
        own = [self._tensor(*each) for each in zip(names, bases, strict=True)]
        if all(a is b for a, b in zip(own, bases, strict=True)):
            return None
        return torch.stack([each.to(torch.float32) for each in own])

    def _whole(self, name: str, tensor: Tensor) -> Whole:
        return Whole(self._rounded(name, tensor))

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        target = self._target(name)
        what = f"{self._bundle.label}: task '{self._task}': tensor '{name}'"
        dtype = target.dtype if tensor.is_floating_point() else tensor.dtype
        return rounded(tensor.detach(), dtype, what).to(target.device)
