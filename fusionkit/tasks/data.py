"""LightningDataModules of many tasks: one dataloader per task, in the order of `tasks`.

`ReuseModule` relies on `tasks` and `kinds`, or on `tasks` and `num_classes` where all of them are
classification; they are known once the datamodule is constructed.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset

from fusionkit.checkpoints.paths import is_remote, open_path, written_out
from fusionkit.errors import DataError, meant
from fusionkit.tasks.task import Task

Split = Literal["train", "test"]
Splits = dict[str, str | dict[str, str]]
"""`train` and `test` → what they are called; a task's name → the same, of that task alone."""


class TaskData(LightningDataModule, ABC):
    """Base of datamodules with several tasks; a subclass says how one split of one task is read.

    The validation rows are a seeded fraction of the training rows; the test rows are all of the
    test split.

    Args:
        tasks: task name → where its data are.
        batch_size: rows per batch.
        val_fraction: share of the training rows kept for validation, in [0, 1).
        limit: at most so many rows per task and split, drawn by the seed; all by default.
        num_workers: loading processes per dataloader.
        seed: of the draws.

    Attributes:
        tasks: the tasks' names, in the order of the dataloaders.
        kinds: task name → of what kind it is.
        splits: what splits are called.
    """

    kinds: dict[str, Task]
    splits: Splits

    def __init__(
        self,
        tasks: Mapping[str, str],
        batch_size: int,
        val_fraction: float,
        limit: int | None,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise DataError(f"expected val_fraction in [0, 1), got {val_fraction}")
        if limit is not None and limit < 1:
            raise DataError(f"expected limit to be at least 1 row, got {limit}")
        self.tasks = list(tasks)
        self.paths = {task: _local(path) for task, path in tasks.items()}
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.limit = limit
        self.num_workers = num_workers
        self.seed = seed
        self.splits = {}
        self._splits: dict[tuple[str, Split], Dataset[Any]] = {}

    def only(self, tasks: Sequence[str]) -> Self:
        """The same data of some tasks, in the order asked for; no other task's rows are read."""
        other = copy(self)
        other.tasks = list(tasks)
        return other

    def called(self, task: str) -> dict[str, str]:
        """What a task's splits are called, as far as `splits` says it."""
        return splits_of(self.splits, task)

    @abstractmethod
    def read(self, task: str, split: Split) -> Dataset[Any]:
        """All rows of one split of one task.

        Raises:
            DataError: they can't be read.
        """

    def collate(self, rows: list[Any]) -> Any:
        """Make a batch of rows."""
        return torch.utils.data.default_collate(rows)

    def order(self, dataset: Dataset[Any], rows: list[int]) -> list[int]:
        """The order in which rows are evaluated; scores don't depend on it."""
        return rows

    def train_dataloader(self) -> list[DataLoader[Any]]:
        """Training rows, shuffled: one dataloader per task."""
        return [self._loader(task, "train", validation=False, shuffle=True) for task in self.tasks]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Validation rows: one dataloader per task."""
        return [self._loader(task, "train", validation=True) for task in self.tasks]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Test rows: one dataloader per task."""
        return [self._loader(task, "test") for task in self.tasks]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """As `test_dataloader`."""
        return self.test_dataloader()

    def calibration_dataloaders(self, rows: int, seed: int) -> dict[str, DataLoader[Any]]:
        """A few training rows of each task, in one fixed order, whatever `limit` is.

        Args:
            rows: rows per task; of a task with fewer, all.
            seed: draws them.
        """
        loaders = {}
        for task in self.tasks:
            training: Any = self._loader(task, "train", limited=False).dataset
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randperm(len(training), generator=generator)[:rows]
            chosen = [training.indices[place] for place in drawn.tolist()]
            loaders[task] = DataLoader(
                Subset(training.dataset, self.order(training.dataset, chosen)),
                batch_size=self.batch_size,
                collate_fn=self.collate,
                num_workers=self.num_workers,
            )
        return loaders

    def _loader(
        self,
        task: str,
        split: Split,
        validation: bool = False,
        shuffle: bool = False,
        limited: bool = True,
    ) -> DataLoader[Any]:
        if (task, split) not in self._splits:
            self._splits[task, split] = self.read(task, split)
        dataset: Any = self._splits[task, split]
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.arange(len(dataset))
        if split == "train":
            rows = torch.randperm(len(dataset), generator=generator)
            kept = round(self.val_fraction * len(dataset))
            rows = rows[:kept] if validation else rows[kept:]
        if limited and self.limit is not None and len(rows) > self.limit:
            rows = rows[torch.randperm(len(rows), generator=generator)[: self.limit]]
        chosen = rows.tolist() if shuffle else self.order(dataset, sorted(rows.tolist()))
        return DataLoader(
            Subset(dataset, chosen),
            batch_size=self.batch_size,
            shuffle=shuffle,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            generator=generator if shuffle else None,
        )


def splits_of(splits: Mapping[str, Any] | None, task: str) -> dict[str, str]:
    """What one task's splits are called: what is said of all, then what is of it alone.

    Args:
        splits: as of `Splits`.
        task: the task's name.
    """
    given = splits or {}
    own = given.get(task)
    found = {name: called for name, called in given.items() if isinstance(called, str)}
    return {**found, **own} if isinstance(own, Mapping) else found


def checked_splits(splits: Splits | None, tasks: Collection[str]) -> Splits:
    """The setting `splits`, of tasks that there are.

    Raises:
        DataError: it is of another.
    """
    own = [name for name, called in (splits or {}).items() if not isinstance(called, str)]
    if unknown := [name for name in own if name not in tasks]:
        raise DataError(
            f"`splits` says of '{unknown[0]}' what its splits are called, and there is no such "
            f"task{meant(unknown[0], tasks) or ';'} there is {', '.join(tasks)}"
        )
    return dict(splits or {})


def _local(path: str | Path) -> Path:
    """Where a task's rows are.

    Raises:
        DataError: it is a URL.
    """
    if is_remote(written_out(str(path))):
        raise DataError(f"{path}: rows are read from the local disk; copy them there")
    return open_path(path)


class ListedRows(Dataset[dict[str, Any]]):
    """Rows that are in a list.

    Args:
        rows: each a mapping of what a batch is made of.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]
