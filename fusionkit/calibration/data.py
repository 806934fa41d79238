"""The rows that are calibrated on."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from fusionkit.errors import DataError
from fusionkit.tasks.wrapped import TRANSFERS, Wrapped


class CalibrationData(Wrapped):
    """A few training rows of every task of a datamodule, one batch of each per step.

    Args:
        datamodule: its `calibration_dataloaders(rows, seed)`, task → dataloader, are used; of one
            without, so many rows of its training dataloaders, which are in the order of `tasks`.
        rows: rows per task.
        seed: draws them.
    """

    def __init__(self, datamodule: Any, rows: int, seed: int) -> None:
        super().__init__(datamodule, list(getattr(datamodule, "tasks", [])))
        self.rows = rows
        self.seed = seed
        for hook in TRANSFERS:
            if self.overrides(hook):
                setattr(self, hook, self._of_each(hook))

    def train_dataloader(self) -> dict[str, Any]:
        """Each task's rows.

        Raises:
            DataError: a task has none.
        """
        loaders = self._loaders()
        for task in self.tasks:
            if task not in loaders or not len(loaders[task]):
                raise DataError(f"there are no calibration data for task '{task}'")
        return loaders

    def batches(self, task: str, device: torch.device) -> Iterator[Any]:
        """One task's rows on a device, as a step gets them: through the datamodule's hooks."""
        for rows in self.train_dataloader()[task]:
            batch = self.on_before_batch_transfer({task: rows}, 0)
            batch = self.transfer_batch_to_device(batch, device, 0)
            yield self.on_after_batch_transfer(batch, 0)[task]

    def _of_each(self, hook: str) -> Any:
        """The datamodule's hook, which knows batches of one task, for those of all."""
        own = getattr(self.datamodule, hook)

        def of_each(batch: dict[str, Any], *rest: Any) -> dict[str, Any]:
            *device, _ = rest  # the last is the dataloader's place, of which there is one here
            return {
                task: own(rows, *device, self.tasks.index(task)) for task, rows in batch.items()
            }

        return of_each

    def _loaders(self) -> dict[str, Any]:
        if hasattr(self.datamodule, "calibration_dataloaders"):
            loaders: dict[str, Any] = self.datamodule.calibration_dataloaders(self.rows, self.seed)
            return loaders
        loaders = self.datamodule.train_dataloader()
        return {task: self._few(loader) for task, loader in zip(self.tasks, loaders, strict=False)}

    def _few(self, loader: Any) -> Any:
        dataset: Any = getattr(loader, "dataset", None)
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            return loader  # a stream is taken as it comes
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(len(dataset), generator=generator)[: self.rows].tolist()
        return DataLoader(
            Subset(dataset, drawn), batch_size=loader.batch_size, collate_fn=loader.collate_fn
        )
