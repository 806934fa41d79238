"""Predictions of a model that becomes one task's after the other, row by row."""

from typing import Any

import torch
from torch.utils.data import Subset

from fusionkit.tasks.spread import real_rows, row_places
from fusionkit.tasks.task import Task


class Prediction:
    """Predicts tasks' rows, batch by batch.

    Args:
        kinds: task → of what kind it is, in the order of the dataloaders.
    """

    def __init__(self, kinds: dict[str, Task]) -> None:
        self.tasks = list(kinds)
        self._kinds = kinds
        self._rows = 0

    def step(
        self, model: Any, batch: Any, batch_idx: int, place: int, loader: Any
    ) -> list[dict[str, Any]]:
        """Predict a batch; rows that fill up a process's share are left out.

        Args:
            model: the task's, itself.
            batch: its rows.
            batch_idx: how many batches of the task were before.
            place: of the task's dataloader.
            loader: that, as the Trainer prepared it.

        Returns:
            `task`, `row` and what the task's kind says (`Task.predictions`) of each row.
        """
        self._rows = 0 if batch_idx == 0 else self._rows
        task = self.tasks[place]
        kind = self._kinds[task]
        outputs, count = kind.answers(model, batch), kind.count(batch)
        real = real_rows(loader, self._rows, count)
        places = row_places(loader, self._rows, real)
        self._rows += count
        found = kind.predictions(outputs[:real].detach().cpu(), kind.first(batch, real))
        rows = _in_data(loader, places)
        return [{"task": task, "row": row, **own} for row, own in zip(rows, found, strict=True)]


def _in_data(loader: Any, places: torch.Tensor) -> list[int]:
    """Which rows of the whole data those at some places of a dataloader are."""
    dataset = getattr(loader, "dataset", None)
    rows: list[int] = places.tolist()
    while isinstance(dataset, Subset):
        rows = [int(dataset.indices[row]) for row in rows]
        dataset = dataset.dataset
    return rows
