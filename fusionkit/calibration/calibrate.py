"""Calibrating a family: a few scalars per task learned by the Trainer, written as a bundle."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from fusionkit.bundles.bundle import Bundle
from fusionkit.calibration.data import CalibrationData
from fusionkit.errors import BundleError
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.training import fit

EPOCHS = 16
"""Epochs, where the Trainer was not told how many."""


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
