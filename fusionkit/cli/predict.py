"""`fusionkit predict`, and the function behind it: what each task's model says of each row."""

import io
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

from fusionkit.checkpoints.disk import check_writable
from fusionkit.cli import report
from fusionkit.cli.recipe import RecipeCLI, quiet
from fusionkit.cli.scored_line import recipe_args
from fusionkit.cli.scored_options import Named
from fusionkit.cli.test import plain_trainer
from fusionkit.errors import FusionKitError
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.spread import over_processes
from fusionkit.tasks.training import interruptions
from fusionkit.tasks.wrapped import Wrapped

Rows = list[dict[str, Any]]
_NAMED = ("prediction", "target")
"""Columns of classes' numbers, of which names are told where they are known."""


def run(args: list[str]) -> None:
    """Predict every task's rows; writes them to `--out`, a file or a folder."""
    summary = (PredictCLI.__doc__ or "").partition("\n")[0]
    recipe = recipe_args(PredictCLI.verb, summary, args, Named)
    if recipe is None:
        return
    cli = PredictCLI(recipe)
    rows = predict(cli.model, cli.datamodule, cli.trainer)
    report.replace_file(cli.file, table_bytes(rows, cli.file))
    report.show(f"written: {cli.file} ({len(rows):,} rows)")


class PredictCLI(RecipeCLI):
    """Write what each task's model says of each row: `--out FILE.csv` or FILE.parquet."""

    verb = "predict"
    writes_out = False  # but for a file, which may be it

    def before_instantiate_classes(self) -> None:
        """Check where to write before any work."""
        self.file = self.out if self.out.suffix else self.out / "predictions.csv"
        table_bytes([], self.file)
        check_writable(self.file)


@quiet()
def predict(module: ReuseModule, datamodule: Any, trainer: Trainer | None = None) -> Rows:
    """What each task's model says of each of its rows.

    `Trainer.predict(module, datamodule)` gives the same rows, batch by batch.

    Args:
        module: becomes each task's model.
        datamodule: rows to predict, or else its test rows.
        trainer: predicts; by default a plain one.

    Returns:
        for each row a mapping: `task`; `row`, its place among the task's rows, from 0; and what
        the task's kind says: of classes the `prediction`, the `probabilities` of all, in the order
        of the head's rows, and the `target`, by name where the datamodule has the classes'
        (`labels`); of regression and of generated texts `prediction` and `target`; of others
        `outputs`.

    Raises:
        FusionKitError: tasks, data and checkpoints don't fit together.
    """
    trainer = trainer or plain_trainer()
    with interruptions(trainer):
        found: Any = trainer.predict(module, datamodule=_Predicted(datamodule)) or []
    rows = [row for batches in _per_loader(found) for batch in batches for row in batch]
    rows = [row for own in over_processes(rows, trainer.world_size) for row in own]
    order = {task: place for place, task in enumerate(datamodule.tasks)}
    names: Mapping[str, Sequence[str]] = getattr(datamodule, "labels", None) or {}
    rows.sort(key=lambda row: (order[row["task"]], row["row"]))
    return [_with_names(row, names.get(row["task"])) for row in rows]


def table_bytes(rows: Rows, path: Path) -> bytes:
    """Rows as a file has them: CSV, in which lists are JSON, or Parquet.

    Args:
        rows: mappings; their keys are columns, of any row.
        path: its ending says which.

    Raises:
        FusionKitError: it is another, or Parquet can't be written here.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    whole = [{name: row.get(name) for name in columns} for row in rows]
    if path.suffix == ".csv":
        flat = [
            {n: json.dumps(v) if isinstance(v, list) else v for n, v in r.items()} for r in whole
        ]
        return report.csv_text(flat).encode()
    if path.suffix != ".parquet":
        raise FusionKitError(f"{path}: expected a file that ends in .csv or .parquet, or a folder")
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise FusionKitError(
            f"{path}: Parquet needs pyarrow; pip install pyarrow, or write a .csv"
        ) from error
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(whole), buffer)
    return buffer.getvalue()


class _Predicted(Wrapped):
    """A datamodule whose test rows are predicted, where it has none that are to be."""

    def __init__(self, datamodule: Any) -> None:
        super().__init__(datamodule, list(datamodule.tasks))

    def predict_dataloader(self) -> Any:
        """The datamodule's own, or its test rows."""
        own: LightningDataModule = self.datamodule
        return (
            own.predict_dataloader()
            if self.overrides("predict_dataloader")
            else own.test_dataloader()
        )


def _per_loader(found: list[Any]) -> list[Any]:
    """Batches by dataloader, of one dataloader as of several."""
    one = bool(found) and bool(found[0]) and isinstance(found[0][0], Mapping)
    return [found] if one else found


def _with_names(row: dict[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    if names is None:
        return row
    named = {n: names[row[n]] for n in _NAMED if isinstance(row.get(n), int)}
    return {**row, **named}
