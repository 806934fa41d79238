"""Results that can be looked at: tables in the terminal and in notebooks, CSV, JSON and a plot."""

import csv
import io
import json
import os
import statistics
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.paths import is_remote, open_path, written_out
from fusionkit.cli.table import Table
from fusionkit.errors import FusionKitError
from fusionkit.tasks.scores import Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        """Write the plot (PNG)."""
        figure, buffer = self.figure(), io.BytesIO()
        figure.savefig(buffer, format="png", dpi=140)
        replace_file(Path(path), buffer.getvalue())


@dataclass(frozen=True)
class Comparison:
    """One way of keeping the family, measured.

    Attributes:
        name: how the recipe calls it.
        settings: the codec as it would be constructed.
        scores: what its tasks score.
        nbytes: bytes on disk, all tasks.
        ratio: T full checkpoints' bytes over `nbytes`.
        bits_per_parameter: stored bits per compressed parameter; see `Bundle`.
        encode_seconds: time to compress all tasks, calibration included.
        switch_seconds: median time of `ReuseModule.switch`.
        spread: standard deviation of the mean score over several calibrations, where there were.
    """

    name: str
    settings: str
    scores: Scores
    nbytes: int
    ratio: float
    bits_per_parameter: float
    encode_seconds: float | None = None
    switch_seconds: float | None = None
    spread: float | None = None


def averaged(rows: Sequence[Comparison]) -> Comparison:
    """One row for several that differ in a seed: the mean of each task's scores, and of the times.

    Args:
        rows: at least one; sizes are the last one's.
    """
    tasks = list(rows[0].scores.values)
    values = {task: statistics.fmean(row.scores.values[task] for row in rows) for task in tasks}
    spread = statistics.stdev(row.scores.mean for row in rows) if len(rows) > 1 else None
    return replace(
        rows[-1],
        scores=replace(rows[-1].scores, values=values),
        encode_seconds=statistics.fmean(row.encode_seconds or 0.0 for row in rows),
        switch_seconds=statistics.fmean(row.switch_seconds or 0.0 for row in rows),
        spread=spread,
    )


@dataclass
class ComparisonReport(Report):
    """Several ways of keeping one family, side by side."""

    rows: list[Comparison] = field(default_factory=list)

    def table(self) -> Table:
        """The comparison as a table."""
        columns = ("score", "share", "bundle", "× smaller", "bits/param", "encode s", "switch ms")
        table = Table("Scores, shares and sizes", ("codec", *columns))
        for row in self.rows:
            table.add(
                row.name,
                percent(row.scores.mean)
                + ("" if row.spread is None else f" ± {percent(row.spread)}"),
                percent(row.scores.share),
                size(row.nbytes),
                f"{row.ratio:.1f}",
                f"{row.bits_per_parameter:.3f}",
                "" if row.encode_seconds is None else f"{row.encode_seconds:.1f}",
                "" if row.switch_seconds is None else f"{row.switch_seconds * 1e3:.0f}",
            )
        return table

    def flat(self) -> list[dict[str, Any]]:
        """One flat row per codec, the tasks' scores as columns."""
        flat = []
        for row in self.rows:
            record = asdict(row)
            record.pop("scores")
            tasks = {f"score/{task}": value for task, value in row.scores.values.items()}
            flat.append(
                {**record, "mean_score": row.scores.mean, "share": row.scores.share, **tasks}
            )
        return flat

    def figure(self) -> "Figure":
        """Score against size, one labelled point per codec."""
        from adjustText import adjust_text

        figure, axes = blank_figure(10, 6.5)
        whole = [row for row in self.rows if row.encode_seconds is None]
        packed = [row for row in self.rows if row.encode_seconds is not None]
        for row in whole:
            label = f"{row.name}: {100 * row.scores.mean:.1f}% at {row.bits_per_parameter:.0f} bits"
            axes.axhline(
                100 * row.scores.mean, linestyle="--", color="grey", linewidth=1, label=label
            )
        axes.legend(loc="lower right")
        axes.set_xscale("log", base=2)
        labels = []
        for place, row in enumerate(packed):
            point = (row.bits_per_parameter, 100 * row.scores.mean)
            axes.scatter(*point, s=45, zorder=3, color=f"C{place % 10}")
            labels.append(axes.text(*point, row.name, fontsize=8, zorder=4))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.15, y=0.12)
        axes.set_xlabel(
            "bits per parameter on disk, shared vector spread over the tasks (log scale)"
        )
        axes.set_ylabel("mean score over the tasks (%)")
        axes.set_title("Score against size: upper left is better")
        axes.grid(alpha=0.3)
        arrows = {"arrowstyle": "-", "color": "grey", "linewidth": 0.6}
        figure.draw_without_rendering()  # labels are moved apart on the final layout
        adjust_text(labels, ax=axes, arrowprops=arrows, expand=(1.15, 1.5), time_lim=5)
        return figure


def blank_figure(width: float, height: float, panels: int = 1) -> "tuple[Figure, Any]":
    """A figure with its axes, apart from pyplot: a notebook's own plots stay as they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, sharex=True)


def scores_table(scores: Scores, title: str) -> Table:
    """Scores as a table, in percent."""
    table = Table(title, ("task", "score", "fine-tuned", "share"), footer=1)
    for row in scores.rows():
        table.add(
            row["task"],
            percent(row["score"]),
            percent(row["finetuned"]),
            percent(row["share"]),
        )
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
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    paths = [folder / f"{name}.csv", folder / f"{name}.json"]
    replace_file(paths[0], text.getvalue().encode())
    replace_file(paths[1], (json.dumps(list(rows), indent=1) + "\n").encode())
    return paths


def local_folder(path: str | Path) -> Path:
    """A folder for results, which are written to the local disk alone.

    Raises:
        FusionKitError: it is a URL.
    """
    if is_remote(written_out(str(path))):
        raise FusionKitError(
            f"{path}: results and trained models are written to the local disk; give a folder there"
        )
    return open_path(path)


def main_process() -> bool:
    """Whether this is the only process, or the one of several that reports."""
    module = sys.modules.get("lightning.pytorch.utilities.rank_zero")  # whoever spreads has it
    return module is None or not module.rank_zero_only.rank


def replace_file(path: Path, content: bytes) -> None:
    """Write a file to a temporary name and rename it; of several processes, in one.

    Args:
        path: the file; its folder is made. One that has this content already is left alone.
        content: what is in it afterwards.
    """
    if not main_process() or (path.is_file() and path.read_bytes() == content):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def show(*items: object) -> None:
    """Print to the terminal, of several processes from one; a pipe gets lines of table width."""
    if not main_process():
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for item in items:
        console.print(item, highlight=False, soft_wrap=isinstance(item, str))


def percent(value: float | None) -> str:
    """A share as percent with two decimals, or nothing."""
    return "" if value is None else f"{100 * value:.2f}"


def size(nbytes: float) -> str:
    """Bytes in the unit that reads best (powers of 1000, as disks count)."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
