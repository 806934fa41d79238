"""Several tasks' classes as those of one task: what a base is pre-trained on."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from fusionkit.errors import DataError
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.data import Split, TaskData


class Joined(TaskData):
    """Tasks of classes as one task, whose classes are all of theirs, one task after the other.

    Batches are made as the tasks' own are; the share of validation rows, the size of a batch and
    the seed are theirs, too.

    Args:
        data: the tasks, of classes, with rows `(x, y)`.
        classes: of each task, the first so many alone; all by default.
        name: the task's.
        limit: at most so many rows per split, of all tasks; all by default.

    Attributes:
        num_classes: the task's name → number of classes.

    Raises:
        DataError: a task is not of classes, or has fewer.
    """

    def __init__(
        self,
        data: TaskData,
        classes: int | None = None,
        name: str = "joined",
        limit: int | None = None,
    ) -> None:
        own = (data.batch_size, data.val_fraction, limit, data.num_workers, data.seed)
        super().__init__({name: ""}, *own)
        self.data = data
        self.classes = {task: _classes_of(data, task, classes) for task in data.tasks}
        self._all = classes is None
        self.num_classes = {name: sum(self.classes.values())}
        self.kinds = {name: Classification(self.num_classes[name])}

    def read(self, task: str, split: Split) -> Dataset[Any]:
        """The rows of each task that are of its classes."""
        parts, first = [], 0
        for each, count in self.classes.items():
            rows: Any = self.data.read(each, split)
            chosen: Sequence[int] = range(len(rows))
            if not self._all:
                chosen = [row for row in chosen if int(rows[row][1]) < count]
            parts.append(_Shifted(rows, chosen, first))
            first += count
        return ConcatDataset(parts)

    def collate(self, rows: list[Any]) -> Any:
        """As the tasks' own."""
        return self.data.collate(rows)


class _Shifted(Dataset[tuple[Any, Any]]):
    """Some rows of a task, their classes counted on from another's."""

    def __init__(self, rows: Any, chosen: Sequence[int], first: int) -> None:
        self._rows, self._chosen, self._first = rows, chosen, first

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x, y = self._rows[self._chosen[index]]
        return x, y + self._first


def _classes_of(data: TaskData, task: str, classes: int | None) -> int:
    """How many classes of a task are taken."""
    kind = data.kinds[task]
    if not isinstance(kind, Classification) or kind.num_classes is None:
        raise DataError(
            f"expected tasks of classes to join, and '{task}' is of {type(kind).__name__}; leave "
            "it out of the data"
        )
    if classes is not None and not 0 < classes <= kind.num_classes:
        raise DataError(
            f"expected `classes` from 1 to {kind.num_classes}, as '{task}' has, got {classes}"
        )
    return kind.num_classes if classes is None else classes
