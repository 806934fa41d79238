"""Codecs at many settings: a table, CSV and JSON, and a plot of weight error against size."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fusionkit.cli.report import Report, blank_figure
from fusionkit.cli.table import Table
from fusionkit.errors import of_extra, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTE = (
    "Errors of weights do not rank codecs of different kinds: Sketch's is larger than the delta "
    "itself, and its models are right. What the models can still do, 'fusionkit compare' shows. "
    "Sketch's noise, its error's energy over the base's, is hardly felt below 0.01; 0.04 costs "
    "something."
)
_ROUNDED = 1e-3
"""Weight error below which points would stretch a plot in which all others are alike."""


@dataclass(frozen=True)
class TaskCost:
    """What one task takes at one setting, and how far off its weights are.

    Attributes:
        nbytes: bytes on disk of the task's own file.
        bits_per_parameter: of them, bits per compressed parameter, private tensors left out.
        weight_error: ‖δ̂ − δ‖² / ‖δ‖² over the compressed tensors; None where δ is zero.
        projection: ⟨δ̂, δ⟩ / ‖δ‖²; 1 where nothing was shrunk. None where δ is zero.
        noise: ‖δ̂ − δ‖² / ‖θ₀‖², the base's energy in its matrices; None where that is zero.
    """

    nbytes: int
    bits_per_parameter: float
    weight_error: float | None
    projection: float | None
    noise: float | None


@dataclass(frozen=True)
class Swept:
    """A codec at one setting, measured.

    Attributes:
        name: how the codec is called.
        point: the setting that makes it another point of its curve in the plot, `rank=8`.
        curve: those settings that make it a point of another curve, `dtype=int4`.
        settings: the codec as it would be constructed.
        nbytes: bytes on disk of the whole bundle.
        ratio: T full checkpoints' bytes over `nbytes`.
        bits_per_parameter: stored bits per compressed parameter; see `Bundle`.
        encode_seconds: time to compress all tasks, as if it were the only setting.
        tasks: each task's own.
    """

    name: str
    point: str
    curve: str
    settings: str
    nbytes: int
    ratio: float
    bits_per_parameter: float
    encode_seconds: float
    tasks: dict[str, TaskCost]

    @property
    def label(self) -> str:
        """What tells it from all others."""
        return " ".join(filter(None, [self.name, self.point, self.curve]))

    @property
    def weight_error(self) -> float | None:
        """The mean over the tasks."""
        return _mean([task.weight_error for task in self.tasks.values()])

    @property
    def projection(self) -> float | None:
        """The mean over the tasks."""
        return _mean([task.projection for task in self.tasks.values()])

    @property
    def noise(self) -> float | None:
        """The mean over the tasks."""
        return _mean([task.noise for task in self.tasks.values()])

    @property
    def noisiest(self) -> tuple[str, float] | None:
        """The task whose noise is largest, and that."""
        known = {task: cost.noise for task, cost in self.tasks.items() if cost.noise is not None}
        return max(known.items(), key=lambda each: each[1]) if known else None


@dataclass
class SweepReport(Report):
    """Codecs at their settings, side by side."""

    rows: list[Swept] = field(default_factory=list)

    def table(self) -> Table:
        """A row for each setting, of all tasks."""
        sizes = ("bundle", "× smaller", "bits/param")
        errors = ("weight error", "projection", "noise", "most noise")
        columns = ("codec", *sizes, *errors, "encode s")
        table = Table("Sizes and errors of weights", columns, note=NOTE)
        for row in self.rows:
            most = row.noisiest
            table.add(
                row.label,
                size(row.nbytes),
                f"{row.ratio:.1f}",
                f"{row.bits_per_parameter:.3f}",
                _number(row.weight_error),
                _number(row.projection),
                _number(row.noise),
                f"{_number(most[1])} {most[0]}" if most else "",
                f"{row.encode_seconds:.1f}",
            )
        return table

    def flat(self) -> list[dict[str, Any]]:
        """A flat row for each setting and task, what is the whole bundle's in each of them."""
        return [
            {
                "codec": row.name,
                "setting": " ".join(filter(None, [row.point, row.curve])),
                "task": task,
                **asdict(cost),
                "bundle_nbytes": row.nbytes,
                "bundle_bits_per_parameter": row.bits_per_parameter,
                "encode_seconds": row.encode_seconds,
                "settings": row.settings,
            }
            for row in self.rows
            for task, cost in row.tasks.items()
        ]

    def figure(self) -> "Figure":
        """Weight error against size, a curve for each codec."""
        adjust_text = of_extra("adjustText", "plots", "a plot").adjust_text
        from matplotlib.patheffects import withStroke
        from matplotlib.ticker import LogLocator

        figure, axes = blank_figure(10, 6.5)
        axes.set_xscale("log")
        axes.set_yscale("log")
        labels, places = [], []
        for place, (name, points) in enumerate(self._curves().items()):
            bits, errors, _ = zip(*points, strict=True)
            curve = name if len(points) > 1 else None  # one point alone is called by its label
            color, marker = f"C{place % 10}", "osD^v"[place // 10 % 5]
            axes.plot(bits, errors, color=color, marker=marker, markersize=5, label=curve)
            places += points
            labels += [axes.text(*at, fontsize=8, color=color, zorder=4) for at in points]
        for label in labels:
            label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        axes.axhline(1, linestyle="--", color="grey", linewidth=1, label="as if nothing were kept")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        axes.margins(x=0.15, y=0.12)
        axes.set_xlabel(
            "bits per parameter on disk, shared parts spread over the tasks (log scale)"
        )
        axes.set_ylabel("weight error ‖δ̂ − δ‖² / ‖δ‖², mean over the tasks (log scale)")
        axes.set_title("Errors of weights against size: they don't rank codecs of different kinds")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        arrows = {"arrowstyle": "-", "color": "grey", "linewidth": 0.6}
        figure.draw_without_rendering()  # labels are moved apart on the final layout
        x, y, _ = zip(*places, strict=True) if places else ((), (), ())
        adjust_text(labels, x, y, ax=axes, arrowprops=arrows, expand=(1.3, 1.6), time_lim=5)
        return figure

    def _curves(self) -> dict[str, list[tuple[float, float, str]]]:
        """A curve's name → its points: bits, error and label, by size.

        What is right but for rounding is drawn below all others, with its error in the label.
        """
        errors = {row.label: row.weight_error or 0.0 for row in self.rows}
        below = min((error for error in errors.values() if error >= _ROUNDED), default=1.0) / 2
        counts = Counter((row.name, row.curve) for row in self.rows)
        curves: dict[str, list[tuple[float, float, str]]] = {}
        for row in sorted(self.rows, key=lambda row: row.nbytes):
            error, alone = errors[row.label], counts[row.name, row.curve] == 1
            text = row.label if alone else row.point.partition("=")[2]
            if error < _ROUNDED:
                error, text = below, f"{text} ({error:.1g} ↓)"
            points = curves.setdefault(f"{row.name} {row.curve}".strip(), [])
            points.append((row.bits_per_parameter, error, text))
        return curves


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that there are."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:#.3g}".rstrip(".")
