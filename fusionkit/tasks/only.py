"""Some of a datamodule's tasks, the datamodule itself left as it is."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from fusionkit.errors import DataError
from fusionkit.tasks.task import Task


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
    present = list(getattr(datamodule, "tasks", []))
    if not present:
        raise DataError("expected a datamodule with the names of its `tasks`")
    for task in tasks:
        if task not in present:
            raise DataError(f"there is no data for task '{task}'; there is {', '.join(present)}")
    if list(tasks) == present:
        whole: LightningDataModule = datamodule
        return whole
    if hasattr(datamodule, "only"):
        own: LightningDataModule = datamodule.only(tasks)
        return own
    return _Only(datamodule, tasks)


class _Only(LightningDataModule):
    """Picks the dataloaders of some tasks."""

    def __init__(self, datamodule: Any, tasks: Sequence[str]) -> None:
        super().__init__()
        self.datamodule = datamodule
        self.tasks = list(tasks)
        self._places = [list(datamodule.tasks).index(task) for task in tasks]
        self.kinds: dict[str, Task] = getattr(datamodule, "kinds", {})
        self.num_classes: dict[str, int] = getattr(datamodule, "num_classes", {})
        # Lightning looks whether a dataloader is overridden: only those that there are, are.
        for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
            if is_overridden(name, datamodule, LightningDataModule):
                setattr(self, name, self._picked(name))

    def prepare_data(self) -> None:
        """The datamodule's."""
        self.datamodule.prepare_data()

    def setup(self, stage: str) -> None:
        """The datamodule's."""
        self.datamodule.trainer = self.trainer
        self.datamodule.setup(stage)

    def _picked(self, name: str) -> Any:
        def dataloaders() -> list[Any]:
            loaders = getattr(self.datamodule, name)()
            return [loaders[place] for place in self._places]

        return dataloaders
