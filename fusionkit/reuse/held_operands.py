"""Tasks' operands that are kept in memory: those used last, up to a number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from fusionkit.reuse.operands import TaskOperands


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
            self._bytes += operands.nbytes
            self._make_room(newest=task)

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

    def _drop(self, task: str) -> bool:
        found = self._held.pop(task, None)
        self._bytes -= found.nbytes if found else 0
        return found is not None

    def _make_room(self, newest: str | None = None) -> None:
        # What was just made is for a batch that is about to begin.
        kept = {*self._in_use, newest}
        for task in [task for task in self._held if task not in kept]:
            if self._bytes <= self.limit:
                return
            self._evicted += self._drop(task)
