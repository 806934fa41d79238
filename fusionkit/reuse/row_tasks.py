"""Which rows of a batch are which task's."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")
Place = slice | Tensor
"""Rows: a slice where they lie side by side, else int64 `(n,)` in ascending order."""


class RowTasks:
    """A task per row; what is worked out of it once is kept for all layers, and all steps.

    Args:
        tasks: of each row; None is the base.

    Attributes:
        tasks: of each row.
        groups: task → its rows, in the order of their first ones.
        runs: the task and the rows of each run of neighbours that are of one task.
    """

    def __init__(self, tasks: Sequence[str | None]) -> None:
        self.tasks = tuple(tasks)
        at: dict[str | None, list[int]] = {}
        self.runs: list[tuple[str | None, slice]] = []
        for row, task in enumerate(self.tasks):
            at.setdefault(task, []).append(row)
            if self.runs and self.runs[-1][0] == task:
                self.runs[-1] = task, slice(self.runs[-1][1].start, row + 1)
            else:
                self.runs.append((task, slice(row, row + 1)))
        self.groups: dict[str | None, Place] = {task: _place(rows) for task, rows in at.items()}
        self._plans: dict[object, Any] = {}
        self._parts: dict[str | None, RowTasks] = {}

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.tasks)

    @property
    def alone(self) -> bool:
        """Whether all rows are of one task, so that nothing need be told apart."""
        return len(self.groups) == 1

    def plan(self, layer: object, make: Callable[[], Plan]) -> Plan:
        """What a layer works out for these rows: made when it is first asked for."""
        if layer not in self._plans:
            self._plans[layer] = make()
        found: Plan = self._plans[layer]
        return found

    def part(self, task: str | None) -> "RowTasks":
        """The rows of one task by themselves."""
        if task not in self._parts:
            self._parts[task] = RowTasks([each for each in self.tasks if each == task])
        return self._parts[task]

    def place(self, tasks: Sequence[str | None]) -> Place:
        """The rows of several tasks."""
        return _place([row for row, task in enumerate(self.tasks) if task in tasks])


def taken(tensor: Tensor, place: Place) -> Tensor:
    """Rows of a tensor: a view where they lie side by side."""
    if isinstance(place, slice):
        return tensor[place]
    return tensor.index_select(0, place.to(tensor.device))


def put(tensor: Tensor, place: Place, rows: Tensor) -> None:
    """Write rows of a tensor."""
    if isinstance(place, slice):
        tensor[place] = rows
    else:
        tensor.index_copy_(0, place.to(tensor.device), rows)


def _place(rows: list[int]) -> Place:
    first, last = rows[0], rows[-1]
    if last - first + 1 == len(rows):
        return slice(first, last + 1)
    return torch.tensor(rows)
