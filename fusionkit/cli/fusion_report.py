"""Fused models side by side: a table, CSV and JSON, and a plot over the number of tasks fused."""

from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import TYPE_CHECKING, Any

from fusionkit.cli.report import Report, blank_figure, percent, score_text
from fusionkit.cli.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Fusion:
    """One set of tasks, fused one way, measured.

    Attributes:
        family: how its adapters were trained.
        method: how they were fused; `single` where there is one task.
        tasks: the tasks' names, joined by `+`.
        count: how many there are.
        score: mean over these tasks.
        share: mean over these tasks of the score relative to the task's own single model; not a
            number where a task has none.
        settings: the merge as it was chosen.
        percent: whether the score lies in [0, 1].
    """

    family: str
    method: str
    tasks: str
    count: int
    score: float
    share: float
    settings: str = ""
    percent: bool = True

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from all others."""
        return self.family, self.method, self.tasks


@dataclass
class FusionReport(Report):
    """All of them."""

    rows: list[Fusion] = field(default_factory=list)

    def flat(self) -> list[dict[str, Any]]:
        """One flat row each."""
        return [asdict(row) for row in self.rows]

    def means(self) -> dict[tuple[str, str], dict[int, tuple[float, float]]]:
        """Family and method → number of tasks → mean score and mean share over the sets."""
        groups: dict[tuple[str, str], dict[int, list[Fusion]]] = {}
        for row in self.rows:
            groups.setdefault((row.family, row.method), {}).setdefault(row.count, []).append(row)
        return {
            key: {
                count: (mean(row.score for row in rows), mean(row.share for row in rows))
                for count, rows in sorted(by_count.items())
            }
            for key, by_count in groups.items()
        }

    def table(self) -> Table:
        """Mean score, and share of the single-task models, by the number of tasks fused."""
        counts = sorted({row.count for row in self.rows})
        columns = [f"{count} task" + "s" * (count > 1) for count in counts]
        if len(counts) > 1:
            columns.append(f"mean of {counts[1]} to {counts[-1]}")
        title = "Score (share of single-task score)"
        table = Table(title, ("family", "fused by", *columns), words=2)
        for (family, method), by_count in self.means().items():
            cells = [self._cell(by_count.get(count)) for count in counts]
            if len(counts) > 1:
                fused = [pair for count, pair in by_count.items() if count > 1]
                both = (mean(p[0] for p in fused), mean(p[1] for p in fused)) if fused else None
                cells.append(self._cell(both))
            table.add(family, method, *cells)
        return table

    def figure(self) -> "Figure":
        """Score and share against the number of tasks fused."""
        figure, panels = blank_figure(12, 5.5, panels=2)
        families = list(dict.fromkeys(row.family for row in self.rows))
        methods = [m for m in dict.fromkeys(row.method for row in self.rows) if m != "single"]
        means = self.means()
        unit, times = (" (%)", 100) if self._percent else ("", 1)
        titles = (f"mean score{unit}", "share of the single-task score (%)")
        for panel, (axes, title) in enumerate(zip(panels, titles, strict=True)):
            for (family, method), by_count in means.items():
                if method == "single":
                    continue
                points = {**means.get((family, "single"), {}), **by_count}
                axes.plot(
                    list(points),
                    [(100 if panel else times) * pair[panel] for pair in points.values()],
                    color=f"C{methods.index(method)}",
                    linestyle=("-", "--", ":", "-.")[families.index(family) % 4],
                    marker="osD^v"[families.index(family) % 5],
                    markersize=5,
                    label=f"{family}, {method}",
                )
            axes.set_ylabel(title)
            axes.set_xlabel("number of tasks fused")
            axes.set_xticks(sorted({row.count for row in self.rows}))
            axes.grid(alpha=0.3)
        panels[0].legend(fontsize=8)
        figure.suptitle("Fused models: mean over all sets of so many tasks")
        return figure

    @property
    def _percent(self) -> bool:
        return all(row.percent for row in self.rows)

    def _cell(self, pair: tuple[float, float] | None) -> str:
        if pair is None:
            return ""
        return f"{score_text(pair[0], self._percent)} ({percent(pair[1])})"
