"""Some of a datamodule's tasks, the datamodule itself left as it is."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule

from fusionkit.errors import DataError
from fusionkit.tasks.wrapped import DATALOADERS, Wrapped


def names_of(datamodule: Any) -> list[str]:
    """The names of a datamodule's tasks.

    Raises:
        DataError: it has none.
    """
    names = list(getattr(datamodule, "tasks", []))
    if not names:
        raise DataError("expected a datamodule with the names of its `tasks`")
    return names


def only(datamodule: Any, tasks: Sequence[str]) -> LightningDataModule:
    """A datamodule of some tasks of another, in the order asked for.

    A datamodule that has a method `only(tasks)` makes it itself, and reads no other task's rows;
    of any other, the dataloaders are picked out by their place in its `tasks`.

    Args:
        datamodule: with `tasks`, and a dataloader for each in their order; it is not changed.
        tasks: the names of some of them.

    Raises:
        DataError: it has no such task.
    """
    present = names_of(datamodule)
    for task in tasks:
        if task not in present:
            raise DataError(f"there is no data for task '{task}'; there is {', '.join(present)}")
    if list(tasks) == present:
        whole: LightningDataModule = datamodule
        return whole
    if hasattr(datamodule, "only"):
        own: LightningDataModule = datamodule.only(tasks)
        return own
    return _Only(datamodule, list(tasks))


class _Only(Wrapped):
    """Picks the dataloaders of some tasks."""

    def __init__(self, datamodule: Any, tasks: list[str]) -> None:
        super().__init__(datamodule, tasks)
        self._places = [list(datamodule.tasks).index(task) for task in tasks]
        for name in DATALOADERS:
            if self.overrides(name):
                setattr(self, name, self._picked(name))

    def _picked(self, name: str) -> Any:
        def dataloaders() -> list[Any]:
            loaders = getattr(self.datamodule, name)()
            return [loaders[place] for place in self._places]

        return dataloaders
