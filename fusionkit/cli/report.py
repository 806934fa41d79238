"""Results that can be looked at: tables in the terminal and in notebooks, CSV, JSON and a plot."""

import csv
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.disk import check_writable
from fusionkit.checkpoints.output_folder import new_file
from fusionkit.checkpoints.paths import is_remote, open_path, written_out
from fusionkit.cli.table import Table
from fusionkit.cli.terminal import main_process
from fusionkit.cli.terminal import show as show  # noqa: PLC0414
from fusionkit.errors import FusionKitError, of_extra, size
from fusionkit.tasks.scores import GAP, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_WAIT = 60
"""Seconds for another run to have written the same file."""
WITHOUT_PLOTS = "for plots beside them: pip install 'fusionkit[plots]', and the same command again"


def plots_are_there() -> bool:
    """Whether what draws plots is installed."""
    return all(map(find_spec, ("matplotlib", "adjustText")))


class Report(ABC):
    """Measurements side by side: a notebook, and rich's console, show their table."""

    @abstractmethod
    def table(self) -> Table:
        """The measurements as a table."""

    @abstractmethod
    def flat(self) -> list[dict[str, Any]]:
        """One flat row each, for CSV and JSON."""

    @abstractmethod
    def figure(self) -> "Figure":
        """The plot, drawn."""

    def __rich__(self) -> Table:
        return self.table()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def plot(self, path: str | Path) -> None:
        """Write the plot: PNG, or what the suffix says (`.svg`: its text stays text)."""
        write_figure(self.figure(), Path(path))


def write_figure(figure: "Figure", *paths: Path) -> None:
    """Write a figure in the formats that the suffixes say; the same figure to the same bytes."""
    rc_context = of_extra("matplotlib", "plots", "a plot").rc_context
    for path in paths:
        buffer, kind = io.BytesIO(), path.suffix.lower().lstrip(".") or "png"
        dateless = {"Date": None} if kind == "svg" else None
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fusionkit"}):
            figure.savefig(buffer, format=kind, dpi=140, metadata=dateless)
        replace_file(path, buffer.getvalue())


def blank_figure(width: float, height: float, panels: int = 1) -> "tuple[Figure, Any]":
    """A figure with its axes, apart from pyplot: a notebook's own plots stay as they are."""
    of_extra("matplotlib", "plots", "a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, sharex=True)


def scores_table(scores: Scores, title: str) -> Table:
    """Scores as a table, in percent where they lie in [0, 1]."""
    columns = ("task", "metric", "score", "95%", "rows", "fine-tuned", "share")
    table = Table(title, columns, words=2, footer=1)
    if scores.limit:
        table.note = f"Only a part of the rows was scored: {scores.limit}."
    if scores.lower and scores.finetuned:
        table.note = f"{table.note} {GAP}".strip()
    for row in scores.rows():
        task = row["task"]
        one = task in scores.values
        parts = scores.of(task).facts.percent if one else scores.percent
        table.add(
            task,
            row["metric"] + (" ↓" if one and scores.of(task).lower else ""),
            score_text(row["score"], parts),
            _ends(row["low"], row["high"], parts),
            "" if row["rows"] is None else f"{row['rows']:,}",
            score_text(row["finetuned"], parts),
            percent(row["share"]),
        )
        for name, value in scores.of(task).others.items() if one else ():
            table.add("", name, f"{value:#.4g}")
    return table


def bundle_table(bundle: Bundle) -> Table:
    """What a bundle holds: bytes, bits per parameter, ratio to full checkpoints, per task."""
    manifest = bundle.manifest
    parameters = max(manifest.base.parameters, 1)
    columns = ("bytes", "of it whole", "bits/param", "full checkpoint", "× smaller")
    table = Table(f"{bundle.path}: {bundle.codec!r}", ("task", *columns), footer=1)
    for task, record in manifest.tasks.items():
        table.add(
            task,
            size(record.file.bytes),
            size(record.private_bytes),
            f"{8 * (record.file.bytes - record.private_bytes) / parameters:.3f}",
            size(record.checkpoint_bytes),
            f"{record.checkpoint_bytes / record.file.bytes:.1f}",
        )
    if manifest.shared:
        bits = f"{8 * manifest.shared.bytes / parameters:.3f}"
        table.add("(shared by all)", size(manifest.shared.bytes), "", bits)
    full = checkpoint_bytes(bundle)
    table.add(
        f"bundle of {len(bundle.tasks)}",
        size(bundle.nbytes),
        size(sum(record.private_bytes for record in manifest.tasks.values())),
        f"{bundle.bits_per_parameter:.3f}",
        size(full),
        f"{full / bundle.nbytes:.1f}",
    )
    return table


def calibration_table(bundle: Bundle) -> Table:
    """What calibration learned, and how much closer it brought each task."""
    records = {task: record.calibration for task, record in bundle.manifest.tasks.items()}
    scalars = any(learned and learned.scale is not None for learned in records.values())
    columns = (*(("shift α", "scale β") if scalars else ()), "rows", "seed", "epochs")
    columns = ("task", *columns, "objective", "before", "after")
    table = Table(f"{bundle.path}: {bundle.codec!r}, calibrated", columns)
    for task, learned in records.items():
        if learned is None:
            table.add(task)
            continue
        own = [f"{value or 0:.3f}" for value in (learned.shift, learned.scale)] if scalars else []
        table.add(
            task,
            *own,
            str(learned.rows),
            str(learned.seed),
            str(learned.epochs),
            learned.objective,
            f"{learned.loss_before:.4f}",
            f"{learned.loss_after:.4f}",
        )
    return table


def checkpoint_bytes(bundle: Bundle) -> int:
    """Bytes on disk of the full checkpoints that a bundle replaces."""
    return sum(record.checkpoint_bytes for record in bundle.manifest.tasks.values())


def write_rows(rows: Sequence[dict[str, Any]], folder: Path, name: str) -> list[Path]:
    """Write rows as `<name>.csv` and `<name>.json` into a folder, each whole or not at all."""
    paths = [folder / f"{name}.csv", folder / f"{name}.json"]
    replace_file(paths[0], csv_text(rows).encode())
    replace_file(paths[1], (json.dumps(list(rows), indent=1) + "\n").encode())
    return paths


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV, the first one's keys above them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def local_folder(path: str | Path, written: bool = True) -> Path:
    """A folder for results, which are written to the local disk alone.

    Args:
        path: the folder, which need not be there.
        written: see that it may be written, before what goes into it is made.

    Raises:
        FusionKitError: it is a URL.
        BundleError: it may not be written.
    """
    if is_remote(written_out(str(path))):
        raise FusionKitError(
            f"{path}: results and trained models are written to the local disk; give a folder there"
        )
    folder = open_path(path)
    if written:
        check_writable(folder / "results")
    return folder


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; of several processes, in one.

    Args:
        path: the file; its folder is made. One that has this content already is left alone.
        content: what is in it afterwards.

    Raises:
        BundleError: it can't be written.
    """
    if not main_process() or (path.is_file() and path.read_bytes() == content):
        return
    with new_file(path, wait=_WAIT) as new:
        new.write_bytes(content)


def percent(value: float | None) -> str:
    """A share as percent with two decimals, or nothing."""
    return "" if value is None else f"{100 * value:.2f}%"


def score_text(value: float | None, parts: bool) -> str:
    """A score: as percent if it lies in [0, 1], else as it is; or nothing."""
    if value is None or math.isnan(value):
        return ""
    return percent(value) if parts else f"{value:#.4g}"


def _ends(low: float | None, high: float | None, parts: bool) -> str:
    """An interval, or nothing."""
    if low is None or high is None:
        return ""
    return f"{100 * low:.1f} to {100 * high:.1f}" if parts else f"{low:#.4g} to {high:#.4g}"
