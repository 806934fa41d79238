"""Tasks' operands that are kept in memory: those used last, up to a number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionkit.reuse.operands import TaskOperands, held_by


@dataclass(frozen=True)
class Figures:
    """What a `MixedBatch` holds, and how often it had what was asked for.

    Attributes:
        bytes: of all operands that are held.
        tasks: how many tasks' operands are held.
        hits: how often a task that was asked for was held.
        misses: how often it had to be read.
        evicted: how often a task's operands went, to make room for others'.
    """

    bytes: int = 0
    tasks: int = 0
    hits: int = 0
    misses: int = 0
    evicted: int = 0


class HeldOperands:
    """Operands by task; threads may share it.

    Args:
        limit: bytes that are kept. What is in use stays beyond it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._held: OrderedDict[str, TaskOperands] = OrderedDict()
        self._counts: dict[int, int] = {}  # by how many tasks a tensor is held
        self._in_use: Collection[str] = ()
        self._bytes = self._hits = self._misses = self._evicted = 0

    @property
    def figures(self) -> Figures:
        """What is held, and how often it was there."""
        with self._lock:
            counts = self._hits, self._misses, self._evicted
            return Figures(self._bytes, len(self._held), *counts)

    def get(self, task: str, record: object) -> TaskOperands | None:
        """A task's operands, if they are held, and were made of this record."""
        found = self.peek(task, record)
        with self._lock:
            if found is None:
                self._misses += 1
            else:
                self._hits += 1
        return found

    def peek(self, task: str, record: object) -> TaskOperands | None:
        """The same, not counted."""
        with self._lock:
            found = self._held.get(task)
            if found is None or found.record != record:
                return None
            self._held.move_to_end(task)
            return found

    def put(self, task: str, operands: TaskOperands) -> None:
        """Keep a task's operands; those used longest ago make room."""
        with self._lock:
            self._drop(task)
            self._held[task] = operands
            for tensor in operands.tensors:
                self._count(tensor, 1)
            self._make_room(newest=task)

    def keep_formed(self, task: str, name: str, tensor: Tensor) -> None:
        """Keep a tensor that was formed of a task's operands, if there is room for it."""
        with self._lock:
            held = self._held.get(task)
            if held is not None and self._bytes + tensor.nbytes <= self.limit:
                held.formed[name] = tensor
                self._bytes += tensor.nbytes

    def alike(self, name: str, tensor: Tensor) -> Tensor:
        """An equal tensor that the task used last has at this place; or the tensor itself."""
        with self._lock:
            last = next(reversed(self._held.values()), None)
        operand = last.operands.get(name) if last else None
        for other in [] if operand is None else held_by(operand):
            same = (other.shape, other.dtype, other.device) == (
                tensor.shape,
                tensor.dtype,
                tensor.device,
            )
            if same and torch.equal(other, tensor):
                return other
        return tensor

    def use(self, tasks: Collection[str]) -> None:
        """Keep these tasks' operands, whatever comes, until others are in use."""
        with self._lock:
            self._in_use = frozenset(tasks)
            self._make_room()

    def forget(self, wanted: Callable[[str], bool]) -> None:
        """Let go of the operands of tasks for which this is true."""
        with self._lock:
            for task in [task for task in self._held if wanted(task)]:
                self._drop(task)

    def _count(self, tensor: Tensor, change: int) -> None:
        before = self._counts.pop(id(tensor), 0)
        if before + change:
            self._counts[id(tensor)] = before + change
        if not before or not before + change:
            self._bytes += change * tensor.nbytes

    def _unform(self, held: TaskOperands) -> None:
        self._bytes -= sum(tensor.nbytes for tensor in held.formed.values())
        held.formed = {}

    def _drop(self, task: str) -> bool:
        found = self._held.pop(task, None)
        if found is None:
            return False
        self._unform(found)
        for tensor in found.tensors:
            self._count(tensor, -1)
        return True

    def _make_room(self, newest: str | None = None) -> None:
        for held in self._held.values():  # what can be formed again goes first
            if self._bytes <= self.limit:
                return
            self._unform(held)
        # What was just made is for a batch that is about to begin.
        kept = {*self._in_use, newest}
        for task in [task for task in self._held if task not in kept]:
            if self._bytes <= self.limit:
                return
            self._evicted += self._drop(task)
