"""What a task does to a model's tensors, in a form that a layer can use on some of its rows."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.adapters.kinds import LoraModule
from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.checkpoints.rounding import rounded
from fusionkit.checkpoints.stacks import row_name
from fusionkit.checkpoints.vocabulary import extended
from fusionkit.codecs.operands import Dense, Masked, Sum, changed, tensors_of
from fusionkit.codecs.operands import Operand as Delta
from fusionkit.task_vectors.task_source import folded_tensor, own_tensor, written


class Whole(NamedTuple):
    """The tensor itself, as the task has it, whatever its shape."""

    tensor: Tensor


Operand = Delta | Whole
"""What a task has of a tensor: its delta as the codec has it, or the tensor itself."""


@dataclass(frozen=True)
class Target:
    """What the model has of one of the base's tensors.

    Attributes:
        dtype: its dtype.
        device: where it is.
    """

    dtype: torch.dtype
    device: torch.device


class TaskOperands:
    """All that a task changes.

    Args:
        operands: by the model's own name of the tensor.
        record: what the bundle said of the task as they were read.

    Attributes:
        operands: as given.
        record: as given.
        formed: tensors that were formed of deltas, as layers needed them, by the same name.
    """

    def __init__(self, operands: Mapping[str, Operand], record: object = None) -> None:
        self.operands, self.record = dict(operands), record
        self.formed: dict[str, Tensor] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """What the operands hold, each once."""
        found: dict[int, Tensor] = {}
        for each in self.operands.values():
            found.update((id(tensor), tensor) for tensor in held_by(each))
        return list(found.values())


def held_by(operand: Operand) -> list[Tensor]:
    """The tensors of an operand."""
    return [operand.tensor] if isinstance(operand, Whole) else tensors_of(operand)


def formed(base: Tensor, delta: Delta, what: str) -> Tensor:
    """A task's tensor from the base's, in its dtype.

    Args:
        base: the model's own.
        delta: the task's.
        what: how messages call the tensor.

    Raises:
        BundleError: a value is too large for the dtype.
    """
    return rounded(delta.dense(base.shape).add_(base), base.dtype, what, copy=False)


def read(
    bundle: Bundle,
    task: str,
    target: Callable[[str], Target],
    alike: Callable[[str, Tensor], Tensor],
) -> dict[str, Operand]:
    """Read a task's operands from its bundle.

    Args:
        bundle: the bundle.
        task: one of its tasks.
        target: the bundle's name of a tensor, a stack's whole → what the model has of it.
        alike: given a tensor of that name, one of another task that is in memory and equal, or
            itself: what tasks share is there once.

    Returns:
        operand by the bundle's name, a stack's whole.

    Raises:
        BundleError: a file was changed, or a value is too large for the model's dtype.
    """
    return dict(_Reader(bundle, task, target, alike).all())


class _Reader:
    def __init__(
        self,
        bundle: Bundle,
        task: str,
        target: Callable[[str], Target],
        alike: Callable[[str, Tensor], Tensor],
    ) -> None:
        self._bundle, self._task, self._base = bundle, task, bundle.base
        self._target, self._alike = target, alike
        self._exact = dict(bundle.exact(task))
        self._added = dict(bundle.added_rows(task))
        self._rows = {
            row_name(stack, i): stack for stack, n in bundle.stacks.items() for i in range(n)
        }

    def all(self) -> Iterator[tuple[str, Operand]]:
        bundle = self._bundle
        for name in dict.fromkeys([*written(bundle), *self._added]):
            if name in self._rows or name not in self._base:
                continue
            if (operand := self._one(name)) is not None:
                yield name, operand
        for stack in bundle.stacks:
            if (tensor := self._stack(stack)) is not None:
                yield stack, self._whole(stack, tensor)
        for name, tensor in bundle.private_tensors(self._task):
            yield name, self._whole(name, tensor)

    def _one(self, name: str) -> Operand | None:
        shape = self._base.specs[name].shape
        if name not in self._added and len(shape) > 1:
            delta = self._delta(name)
            whole = math.prod(shape) * self._target(name).dtype.itemsize
            if delta is not None and _own_bytes(delta) < whole:
                return self._kept(name, delta)
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

    def _delta(self, name: str) -> Delta | None:
        """A task's delta as the codec, or an adapter, has it."""
        bundle = self._bundle
        module = bundle.space.layout.by_target.get(name) if bundle.space else None
        if module is None:
            return bundle.operand(self._task, name) if bundle.roles[name] == "delta" else None
        if not isinstance(module, LoraModule) or bundle.roles[name] == "delta":
            return None
        if name != module.targets[0]:
            return None
        start = {each: bundle.initial[each] for each in module.tensors}
        own = {n: own_tensor(bundle, self._task, n, t) for n, t in start.items()}
        return module.low_rank(own, start)

    def _kept(self, name: str, delta: Delta) -> Delta:
        """A delta in memory of its own; a product in the model's dtype."""
        device = self._target(name).device
        if isinstance(delta, LowRank):
            return LowRank(*(self._rounded(name, factor) for factor in delta))
        return changed(delta, lambda tensor: self._alike(name, tensor.to(device, copy=True)))

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


def _own_bytes(delta: Delta) -> int:
    """Bytes that a delta takes beside the vectors that tasks share."""
    if isinstance(delta, Sum):
        return sum(map(_own_bytes, delta.terms))
    shared = delta.values.nbytes if isinstance(delta, Dense | Masked) else 0
    return sum(tensor.nbytes for tensor in tensors_of(delta)) - shared
