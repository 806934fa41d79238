"""How far a task's calibration is."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Values = tuple[float, ...]
"""What is learned of one task, as the optimiser has it."""


@dataclass
class TaskProgress:
    """One task's.

    Attributes:
        start: its numbers at first.
        place: where among all tasks' numbers its own are.
        best: the numbers of the least loss so far.
        best_loss: that loss.
        best_epoch: when it was seen.
        first_loss: the loss as it was encoded; None before the first epoch has ended.
        epochs: how many it took part in.
        done: it has nothing left to learn.
        rows_seen: rows that this process had in the epoch that runs.
        targets: number of a batch → the batch, and what the fine-tuned model said of it; None
            where labels are the objective.
    """

    start: Values
    place: slice
    best: Values = field(init=False)
    best_loss: float = math.inf
    best_epoch: int = 0
    first_loss: float | None = None
    epochs: int = 0
    done: bool = False
    rows_seen: int = 0
    targets: dict[int, tuple[Any, Tensor | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.best = self.start

    def take(self, loss: float, values: Values, epoch: int) -> None:
        """Note an epoch's loss, and keep its numbers if it is the best."""
        self.epochs = epoch + 1
        if loss < self.best_loss:
            self.best_loss, self.best, self.best_epoch = loss, values, epoch


def state_of(tasks: list[TaskProgress]) -> dict[str, Any]:
    """What a training checkpoint keeps of all tasks."""
    return {
        "first": [each.first_loss for each in tasks if each.first_loss is not None],
        "best": [(each.best_loss, each.best, each.best_epoch) for each in tasks],
        "epochs": [each.epochs for each in tasks],
        "done": [each.done for each in tasks],
    }


def load_state(tasks: list[TaskProgress], state: dict[str, Any]) -> None:
    """Go on from what `state_of` kept."""
    for place, each in enumerate(tasks):
        each.first_loss = state["first"][place] if state["first"] else None
        each.best_loss, best, each.best_epoch = state["best"][place]
        each.best = tuple(best)
        each.epochs, each.done = state["epochs"][place], state["done"][place]
