"""Calibrating a family: a few numbers per task learned by the Trainer, written as a bundle."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from msgspec.structs import replace

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.format import MANIFEST
from fusionkit.bundles.manifest import CalibrationRecord
from fusionkit.bundles.space import bundle_needs
from fusionkit.calibration.data import CalibrationData
from fusionkit.calibration.dbms import DBMSCalibration
from fusionkit.calibration.learned_parts import PartsCalibration
from fusionkit.calibration.module import CalibrationModule
from fusionkit.calibration.settings import Calibration
from fusionkit.checkpoints.disk import check_space
from fusionkit.checkpoints.output_folder import check_replaceable
from fusionkit.checkpoints.paths import open_path
from fusionkit.codecs.base import DeltaCodec
from fusionkit.codecs.dbms import DBMS
from fusionkit.errors import FusionKitError
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.training import fit

EPOCHS = 16
"""Epochs, where the Trainer was not told how many."""

_SETTINGS = Calibration()


def calibrate(
    module: ReuseModule,
    datamodule: Any,
    out: str | Path | None = None,
    *,
    settings: Calibration = _SETTINGS,
    codec: DeltaCodec | None = None,
    trainer: Trainer | None = None,
    ckpt_path: str | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Compress a module's family, with a few numbers per task learned on a few batches.

    Of DBMS (2505.11344) they are its shift and scale; of another codec its `learned` parts. The
    module then reuses the bundle.

    Args:
        module: its base and fine-tuned checkpoints are used.
        datamodule: of the family's tasks; see `CalibrationData`.
        out: the bundle's folder; by default a temporary one.
        settings: how to calibrate.
        codec: what is calibrated; by default the module's own.
        trainer: fits; by default a plain one of so many epochs.
        ckpt_path: resume from this checkpoint; `last`: from the newest.
        overwrite: replace the folder if it is there.

    Returns:
        the bundle, with what was learned in its manifest.

    Raises:
        BundleError: `out` exists, can't be written, or can't fit on its disk.
        DataError: a task has no calibration data, or its loss is not finite from the start.
        FusionKitError: there is nothing to calibrate, or no checkpoint to resume from.
        KeyboardInterrupt: it was interrupted; nothing is saved but checkpoints.
    """
    if out is not None:
        check_replaceable(out, overwrite, known_by=MANIFEST)
    trainer = trainer or Trainer(
        max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    calibration = _module(module, settings, codec or module.codec)
    if out is not None and trainer.is_global_zero:
        check_space(open_path(out), bundle_needs(module.family(), calibration.codec))
    data = CalibrationData(datamodule, settings.rows, settings.seed)
    try:
        fit(trainer, calibration, data, ckpt_path)
        bundle = _finish(calibration, out if trainer.is_global_zero else None, overwrite)
    finally:
        calibration.end()
    module.reuse(bundle)
    return bundle


def _module(
    reuse: ReuseModule, settings: Calibration, codec: DeltaCodec | None
) -> CalibrationModule:
    """What calibrates a codec."""
    if isinstance(codec, DBMS):
        return DBMSCalibration(reuse, settings, codec)
    if codec is not None and codec.learned:
        return PartsCalibration(reuse, settings, codec)
    raise FusionKitError(
        f"the codec {codec!r} has nothing to calibrate; wrap it: "
        "codec: {class_path: DBMS, init_args: {codec: …}}"
    )


def _finish(calibration: CalibrationModule, out: str | Path | None, overwrite: bool) -> Bundle:
    """Make the bundle of the best, and record in its manifest what calibration did."""
    progress, first = calibration.progress, [each.first_loss for each in calibration.progress]
    if None in first:
        raise FusionKitError("no epoch has ended; give the Trainer max_epochs of 1 at least")
    best = [each.best for each in progress]
    after, rows = calibration.losses_at(best)
    # A codec that encodes all tasks together is not the same again once the others moved on.
    worse = [p for p, value in enumerate(after) if not value <= (first[p] or 0.0)]
    if worse:
        best = [progress[p].start if p in worse else each for p, each in enumerate(best)]
        after, rows = calibration.losses_at(best)
    bundle = calibration.bundle_of(best)
    records = dict(bundle.manifest.tasks)
    settings = calibration.settings
    for place, scalars in enumerate(calibration.shift_and_scale(best)):
        task = calibration.family.tasks[place]
        learned = CalibrationRecord(
            *scalars,
            objective=settings.objective,
            method=settings.method,
            rows=rows[place],
            seed=settings.seed,
            epochs=progress[place].epochs,
            loss_before=first[place] or 0.0,
            loss_after=after[place],
        )
        records[task] = replace(records[task], calibration=learned)
    bundle.update(replace(bundle.manifest, tasks=records))
    if out is None:
        return bundle
    bundle.save(out, overwrite)
    return Bundle(out, calibration.family.base, key="")
