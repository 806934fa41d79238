"""A datamodule around another one: what a wrapper does not change is the other's."""

from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from fusionkit.tasks.task import Task

DATALOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_OTHERS = ("prepare_data", "teardown", "on_exception", "state_dict", "load_state_dict")


class Wrapped(LightningDataModule):
    """Base of datamodules that are another one, but for its tasks or its dataloaders.

    Lightning looks which hooks a datamodule overrides: those that the other one does, this one
    does, too.

    Args:
        datamodule: the other one; it is not changed, but for the Trainer that it belongs to.
        tasks: the tasks' names, in the order of the dataloaders.
    """

    def __init__(self, datamodule: Any, tasks: list[str]) -> None:
        self.datamodule = datamodule
        super().__init__()
        self.tasks = tasks
        self.prepare_data_per_node = getattr(datamodule, "prepare_data_per_node", True)
        for hook in (*TRANSFERS, *_OTHERS):
            if self.overrides(hook):
                setattr(self, hook, getattr(datamodule, hook))

    @property
    def kinds(self) -> dict[str, Task]:
        """The datamodule's."""
        return getattr(self.datamodule, "kinds", None) or {}

    @property
    def num_classes(self) -> dict[str, int]:
        """The datamodule's."""
        return getattr(self.datamodule, "num_classes", None) or {}

    @property
    def trainer(self) -> Any:
        """The Trainer; the datamodule's, too."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        self._trainer = self.datamodule.trainer = trainer

    def setup(self, stage: str) -> None:
        """The datamodule's."""
        self.datamodule.setup(stage)

    def overrides(self, hook: str) -> bool:
        """Whether the datamodule has a hook of its own."""
        return is_overridden(hook, self.datamodule, LightningDataModule)
