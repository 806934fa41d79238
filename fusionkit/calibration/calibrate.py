"""Calibrating a family: a few scalars per task learned by the Trainer, written as a bundle."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Subset

from fusionkit.bundles.bundle import Bundle
from fusionkit.errors import BundleError, DataError
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.training import fit

EPOCHS = 16
"""Epochs, where the Trainer was not told how many."""


class CalibrationData(LightningDataModule):
    """A few training rows of every task of a datamodule, one batch of each per step.

    Args:
        datamodule: its `calibration_dataloaders(rows, seed)`, task → dataloader, are used; of one
            without, so many rows of its training dataloaders, which are in the order of `tasks`.
        rows: rows per task.
        seed: draws them.
    """

    def __init__(self, datamodule: Any, rows: int, seed: int) -> None:
        super().__init__()
        self.datamodule = datamodule
        self.rows = rows
        self.seed = seed
        self.tasks: list[str] = list(getattr(datamodule, "tasks", []))

    def prepare_data(self) -> None:
        """The datamodule's."""
        self.datamodule.prepare_data()

    def setup(self, stage: str) -> None:
        """The datamodule's."""
        self.datamodule.setup(stage)

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


def calibrate(
    module: ReuseModule,
    datamodule: Any,
    out: str | Path | None = None,
    *,
    trainer: Trainer | None = None,
    ckpt_path: str | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Compress a module's family, with a few scalars per task learned on a few batches.

    Of DBMS (2505.11344) they are its shift and scale; of another codec its `learned` parts. The
    module then reuses the bundle.

    Args:
        module: its base, fine-tuned checkpoints, codec, and `calibration` settings.
        datamodule: of the family's tasks; see `CalibrationData`.
        out: the bundle's folder; by default a temporary one.
        trainer: fits; by default a plain one of so many epochs.
        ckpt_path: resume from this checkpoint; `last`: from the newest.
        overwrite: replace the folder if it is there.

    Returns:
        the bundle, with what was learned in its manifest.

    Raises:
        BundleError: `out` exists, or can't be written.
        DataError: a task has no calibration data, or its loss is not finite from the start.
        FusionKitError: there is nothing to calibrate, or no checkpoint to resume from.
        KeyboardInterrupt: it was interrupted; nothing is saved but checkpoints.
    """
    if out is not None and Path(out).exists() and not overwrite:
        raise BundleError(f"{out}: exists; choose another folder, or set overwrite to replace it")
    trainer = trainer or Trainer(
        max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    data = CalibrationData(datamodule, module.calibration.rows, module.calibration.seed)
    try:
        fit(trainer, module, data, ckpt_path)
        calibrator = module.calibrator
        assert calibrator is not None
        bundle = calibrator.finish(out if trainer.is_global_zero else None, overwrite)
    finally:
        module.end_calibration()
    module.reuse(bundle)
    return bundle
