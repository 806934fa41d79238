"""Evaluation over several processes: rows or whole tasks are spread, and no row counts twice.

Lightning gives every process as many rows of a dataloader as the others, so that none waits for
another in vain; rows that are left over are filled up with repeated ones. Those are known by their
place, and left out of the metrics: scores are those of one process, to the last count.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchmetrics import Metric

from fusionkit.errors import DataError
from fusionkit.tasks.metrics import value_of
from fusionkit.tasks.wrapped import Wrapped

Found = TypeVar("Found")

Spread = Literal["rows", "tasks"]
"""What each of several processes evaluates: its share of every task's rows, or whole tasks."""


def real_rows(loader: Any, first: int, count: int) -> int:
    """How many rows of a batch are no repetitions; those come last.

    Args:
        loader: the dataloader, as the Trainer prepared it.
        first: rows that this process had from it before the batch.
        count: rows of the batch.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return count
    total = len(sampler.dataset)  # type: ignore[arg-type]
    # The k-th row here is the (rank + k · processes)-th of all.
    own = -(-(total - sampler.rank) // sampler.num_replicas)
    return min(max(own - first, 0), count)


def row_places(loader: Any, first: int, count: int) -> Tensor:
    """Which of all rows a batch's are, `(count,)` int64.

    Args:
        loader: the dataloader, as the Trainer prepared it.
        first: rows that this process had from it before the batch.
        count: rows of the batch that are no repetitions.
    """
    own = torch.arange(first, first + count)
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return own
    return sampler.rank + sampler.num_replicas * own


def over_processes(own: Found, count: int) -> list[Found]:
    """What each process has, in every process, in their order.

    Args:
        own: what this one has.
        count: how many processes there are.
    """
    if count == 1:
        return [own]
    found: list[Any] = [None] * count
    torch.distributed.all_gather_object(found, own)
    return found


class TasksSpread(Wrapped):
    """A datamodule whose tasks are shared out among the processes, each evaluated by one, whole.

    A process then switches to its own tasks only: for many tasks, of few rows each. The largest
    tasks are given away first, each to the process with the least to do.

    Args:
        datamodule: its `tasks`, their `kinds` or `num_classes`, and its evaluation dataloaders are
            used.
    """

    def __init__(self, datamodule: Any) -> None:
        super().__init__(datamodule, list(datamodule.tasks))
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """This process's tasks', and empty ones of the others.

        Raises:
            DataError: a dataloader has no dataset whose rows can be taken one by one.
        """
        return self._own(self.datamodule.test_dataloader())

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """As `test_dataloader`, of the validation rows."""
        return self._own(self.datamodule.val_dataloader())

    def _own(self, loaders: Sequence[DataLoader[Any]]) -> list[DataLoader[Any]]:
        for task, loader in zip(self.tasks, loaders, strict=True):
            if not hasattr(getattr(loader, "dataset", None), "__len__") or not loader.batch_size:
                raise DataError(
                    f"the dataloader of task '{task}' has no dataset of known length, or batches "
                    "of its own; spread rows instead of tasks"
                )
        shares = share_out([len(each.dataset) for each in loaders], self.trainer.world_size)  # type: ignore[arg-type]
        own = shares[self.trainer.global_rank]
        # Every process has a dataloader of every task, as Lightning expects; those of others' are
        # empty. One that has nothing to do gets a row that does not count: it would not wait for
        # the others' scores otherwise.
        found = [
            _loader(each, each.dataset if place in own else Subset(each.dataset, []))
            for place, each in enumerate(loaders)
        ]
        if not own:
            found[0] = _loader(loaders[0], Subset(loaders[0].dataset, [0]), replicas=2, rank=1)
        return found


def value_of_owner(module: LightningModule, metric: Metric, task: str) -> float:
    """A task's score, in every process, where one process alone evaluates it.

    Args:
        module: the module whose processes these are.
        metric: has seen the task's rows in one of them.
        task: the task.
    """
    own = metric.update_called
    for part in metric.modules():  # computed without the others
        if isinstance(part, Metric):
            part.distributed_available_fn = _nobody
    pair = torch.tensor([value_of(metric, task) if own else 0.0, float(own)], dtype=torch.float64)
    gathered: Any = module.all_gather(pair.to(module.device))
    values = gathered.view(-1, 2)
    return float(values[values[:, 1] > 0, 0].mean())


def _nobody() -> bool:
    return False


def share_out(sizes: Sequence[int], processes: int) -> list[list[int]]:
    """Each process's places in `sizes`, in order, so that the largest sum is small."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    sums = [0] * processes
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        least = sums.index(min(sums))
        shares[least].append(place)
        sums[least] += sizes[place]
    return [sorted(share) for share in shares]


def _loader(
    like: DataLoader[Any], dataset: Dataset[Any], replicas: int = 1, rank: int = 0
) -> DataLoader[Any]:
    """The same over other rows, with a sampler that the Trainer leaves alone."""
    return DataLoader(
        dataset,
        like.batch_size,
        sampler=DistributedSampler(dataset, replicas, rank, shuffle=False),
        collate_fn=like.collate_fn,
        num_workers=like.num_workers,
        pin_memory=like.pin_memory,
    )
