"""`Trainer.fit`, with errors and interruptions as the rest of FusionKit has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.paths import is_there, written_out
from fusionkit.errors import FusionKitError


def fit(trainer: Any, module: LightningModule, datamodule: Any, ckpt_path: str | None) -> None:
    """Fit a module through the Trainer.

    Args:
        trainer: the Lightning Trainer.
        module: what to fit.
        datamodule: its data.
        ckpt_path: resume from this checkpoint; `last`: from the newest.

    Raises:
        CheckpointError: the checkpoint is damaged.
        FusionKitError: there is no checkpoint to resume from.
        KeyboardInterrupt: it was interrupted.
    """
    ckpt_path = ckpt_path and written_out(ckpt_path)
    if ckpt_path and Path(ckpt_path).is_file():
        Checkpoint.of(ckpt_path)  # says what is wrong with a damaged one
    try:
        with interruptions(trainer):
            trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    except FileNotFoundError as error:
        if ckpt_path is None or is_there(ckpt_path):
            raise
        raise FusionKitError(f"{ckpt_path}: no such checkpoint to resume from") from error


@contextmanager
def interruptions(trainer: Any) -> Iterator[None]:
    """A context in which the Trainer is interrupted as all else is.

    Raises:
        KeyboardInterrupt: it was.
    """
    try:
        yield
    except SystemExit as stopped:  # Lightning's answer to Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from stopped
        raise
    if trainer.interrupted:
        raise KeyboardInterrupt
