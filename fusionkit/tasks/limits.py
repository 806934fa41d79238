"""What keeps rows from being evaluated, as it was asked for."""

from typing import Any

from fusionkit.tasks.wrapped import Wrapped


def limit_of(trainer: Any, datamodule: Any, stage: str = "test") -> str:
    """What limits an evaluation, a datamodule's `limit` or the Trainer's; empty if nothing does.

    Args:
        trainer: evaluates.
        datamodule: the rows.
        stage: `test` or `val`.
    """
    while isinstance(datamodule, Wrapped):
        datamodule = datamodule.datamodule
    found = []
    rows = getattr(datamodule, "limit", None)
    if isinstance(rows, int):
        found.append(f"limit={rows}")
    batches = getattr(trainer, f"limit_{stage}_batches", None)
    if batches is not None and not (isinstance(batches, float) and batches == 1.0):
        found.append(f"limit_{stage}_batches={batches}")
    return ", ".join(found)
