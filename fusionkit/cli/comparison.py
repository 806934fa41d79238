"""Ways of keeping one family of models, side by side: what was measured of each."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fusionkit.cli.published import Published, unlike
from fusionkit.cli.report import Report, percent, score_text
from fusionkit.cli.table import Table
from fusionkit.errors import size
from fusionkit.tasks.resample import Interval, interval
from fusionkit.tasks.scores import GAP, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fusionkit.cli.front_plot import Axis, Mark

Kind = Literal["fine-tuned", "base", "codec"]
CALIBRATED = ", calibrated"
"""How the row of a codec that was calibrated ends."""
NOISE = (
    "≈: within noise of the best: resampling the rows, by which all are scored, leaves the sign of "
    "the difference open (95%)."
)


@dataclass(frozen=True)
class Comparison:
    """One way of keeping the family, measured.

    Attributes:
        name: how the recipe calls it.
        settings: the codec as it would be constructed.
        scores: what its tasks score.
        nbytes: bytes on disk, all tasks.
        ratio: T full checkpoints' bytes over `nbytes`; of the base itself 0.
        bits_per_parameter: stored bits per compressed parameter; see `Bundle`.
        encode_seconds: time to compress all tasks, calibration included.
        switch_seconds: median time of `ReuseModule.switch`.
        spread: standard deviation of the mean score over several calibrations, where there were.
        kind: the models as they were fine-tuned, the base with their heads, or a codec's.
        base_nbytes: bytes of the base, which is kept beside a bundle.
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
    kind: Kind = "codec"
    base_nbytes: int = 0

    @property
    def total_nbytes(self) -> int:
        """Bytes of all that has to be kept: the base, too."""
        return self.nbytes + self.base_nbytes


def averaged(rows: Sequence[Comparison]) -> Comparison:
    """One row for several that differ in a seed: the mean of each task's scores, and of the times.

    Args:
        rows: at least one; sizes are the last one's.
    """
    last = rows[-1].scores
    tasks = list(rows[0].scores.values)
    values = {task: statistics.fmean(row.scores.values[task] for row in rows) for task in tasks}
    scatters = len(rows) > 1 and last.alike
    spread = statistics.stdev(row.scores.mean for row in rows) if scatters else None
    measured = dict(last.measured)
    for task in measured:
        each = [row.scores.of(task) for row in rows]
        own = [one.row_scores for one in each if one.row_scores is not None]
        measured[task] = replace(
            each[-1],
            others={n: statistics.fmean(e.others[n] for e in each) for n in each[-1].others},
            row_scores=torch.stack(own).mean(0) if len(own) == len(each) else None,
        )
    return replace(
        rows[-1],
        scores=replace(last, values=values, measured=measured),
        encode_seconds=statistics.fmean(row.encode_seconds or 0.0 for row in rows),
        switch_seconds=statistics.fmean(row.switch_seconds or 0.0 for row in rows),
        spread=spread,
    )


@dataclass
class ComparisonReport(Report):
    """Several ways of keeping one family, side by side.

    Attributes:
        rows: what was measured.
        published: what others have published, shown beside it and marked; no mean, share, front or
            best of ours has anything of it.
    """

    rows: list[Comparison] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """The tasks that are scored."""
        return list(self.rows[0].scores.values) if self.rows else []

    @property
    def by_share(self) -> bool:
        """Whether rows are ranked by their shares; else by their mean scores."""
        return all(row.scores.share is not None for row in self.rows if row.kind != "base")

    @property
    def codecs(self) -> list[Comparison]:
        """The rows of codecs."""
        return [row for row in self.rows if row.kind == "codec"]

    @property
    def best(self) -> Comparison | None:
        """The codec that keeps most, whatever it takes."""
        known = [row for row in self.codecs if not math.isnan(self.value(row))]
        return max(known, key=self.value, default=None)

    def row(self, kind: Kind) -> Comparison | None:
        """The row of a kind that there is one of."""
        return next((row for row in self.rows if row.kind == kind), None)

    def value(self, row: Comparison) -> float:
        """What a row is ranked by, more being better; not a number where nothing is known."""
        if self.by_share:
            return math.nan if row.scores.share is None else row.scores.share
        return -row.scores.mean if row.scores.lower else row.scores.mean

    def interval(self, row: Comparison) -> Interval | None:
        """Where `value` lies with 95% confidence; None if that is not known."""
        samples = self._samples(row)
        if samples is None:
            return None
        low, high = interval(samples)
        # Of few rows some draws may have no gap between base and fine-tuned, and so no share.
        return (low, high) if math.isfinite(low) and math.isfinite(high) else None

    def within_noise(self, row: Comparison) -> bool:
        """Whether a codec may be as good as the best one, by rows that are resampled alike."""
        best = self.best
        if best is None or row is best or row.kind != "codec":
            return False
        own, others = self._samples(row), self._samples(best)
        return own is not None and others is not None and interval(others - own)[0] <= 0

    def table(self) -> Table:
        """The comparison as a table."""
        share, score = ("share ± 95%", "score") if self.by_share else ("share", "score ± 95%")
        sizes = ("bundle", "with base", "× smaller", "bits/param", "encode s", "switch ms")
        notes = [self._note()]
        columns = ("codec", score, share, "worst task", *sizes)
        table = Table("Scores, shares and sizes", columns)
        for row in self.rows:
            near = self.within_noise(row)
            notes += [NOISE] * near
            around = self._around(row) + " ≈" * near
            table.add(
                row.name,
                score_text(row.scores.mean, row.scores.percent)
                + ("" if row.spread is None else f", seeds ± {100 * row.spread:.2f}")
                + ("" if self.by_share else around),
                percent(row.scores.share) + (around if self.by_share else ""),
                _worst(row.scores),
                size(row.nbytes) if row.nbytes else "",
                size(row.total_nbytes),
                f"{row.ratio:.1f}" if row.ratio else "",
                f"{row.bits_per_parameter:.3f}",
                "" if row.encode_seconds is None else f"{row.encode_seconds:.1f}",
                "" if row.switch_seconds is None else f"{row.switch_seconds * 1e3:.0f}",
            )
        notes += self._add_published(table)
        table.note = " ".join(filter(None, dict.fromkeys(notes)))
        return table

    def _add_published(self, table: Table) -> list[str]:
        """Add the published rows below ours; what is to be known of them."""
        table.footer, notes = len(self.published), []
        for row in self.published:
            bits = "" if row.figures.bits is None else f"{row.figures.bits:.3f}"
            mean, share = percent(row.mean(self.tasks)), percent(row.share(self.tasks))
            table.add(row.title, mean, share, "", "", "", "", bits)
            notes.append(f"†: published, not measured here: {row.source} ({row.setting}).")
        if any(row.mean(self.tasks) is None for row in self.published):
            notes.append("Of other tasks than these, published figures have no mean here.")
        metrics = {task: self.rows[0].scores.of(task).facts.name for task in self.tasks}
        notes += [f"{finding}." for finding in unlike(self.published, metrics)]
        return notes

    def flat(self) -> list[dict[str, Any]]:
        """One flat row per codec, the tasks' scores as columns."""
        ours = [self._flat(row) for row in self.rows]
        if not self.published or not ours:
            return ours
        theirs = [row.flat(self.tasks, ours[0]) for row in self.published]
        return [*({**row, "source": "", "setting": ""} for row in ours), *theirs]

    def figure(self) -> "Figure":
        """What is kept against size: a mark for each codec, and the front."""
        from fusionkit.cli.front_plot import draw_front

        lines = {
            f"{row.name} ({row.bits_per_parameter:.0f} bits)"
            if row.bits_per_parameter
            else row.name: self.value(row)
            for row in self.rows
            if row.kind != "codec" and math.isfinite(self.value(row))
        }
        title = "What is kept against size: upper left is better"
        return draw_front(self.marks(), self.axis, title, lines, published=self.published_marks())

    def heat_map(self) -> "Figure":
        """What each codec keeps of each task."""
        from fusionkit.cli.heat_map import draw_heat_map

        rows = [row for row in self.rows if row.kind != "fine-tuned"]
        tasks = self.tasks
        shares = [[row.scores.share_of(task) for task in tasks] for row in rows]
        return draw_heat_map([row.name for row in rows], tasks, shares)

    def marks(self) -> "list[Mark]":
        """The codecs as they are plotted."""
        from fusionkit.cli.front_plot import Mark

        found = []
        for row in self.codecs:
            value = self.value(row)
            if math.isfinite(value) and row.bits_per_parameter > 0:
                low, high = self.interval(row) or (None, None)
                saw = row.settings.startswith("DBMS") or row.name.endswith(CALIBRATED)
                bits = row.bits_per_parameter
                found.append(Mark(row.name, row.settings, bits, value, low, high, saw))
        return found

    def published_marks(self) -> "list[Mark]":
        """The published rows as they are plotted, those of which size and score are known."""
        if not self.by_share and not all(row.scores.percent for row in self.rows):
            return []
        found = [row.mark(self.tasks, self.by_share) for row in self.published]
        return [mark for mark in found if mark is not None]

    @property
    def axis(self) -> "Axis":
        """What height means in the plot."""
        from fusionkit.cli.front_plot import Axis, crowded

        if not self.by_share:
            parts = all(row.scores.percent for row in self.rows)
            lower = any(row.scores.lower for row in self.rows)
            unit = " (%)" if parts else ""
            return Axis(f"mean score over the tasks{unit}" + ", negated" * lower, parts)
        losses = crowded([self.value(row) for row in self.codecs])
        label = "kept of the fine-tuned score (%)"
        if any(row.scores.lower for row in self.rows):
            label = "kept of the fine-tuned score; of errors, part of the base's gap closed (%)"
        return Axis(label + ", loss on a log scale" * losses, True, losses)

    def interval_text(self, row: Comparison) -> str:
        """A row's interval, in the unit of what it is of."""
        found = self.interval(row)
        if found is None:
            return ""
        if not self.by_share and row.scores.lower:
            found = -found[1], -found[0]
        if self.by_share or row.scores.percent:
            return f"{100 * found[0]:.1f} to {100 * found[1]:.1f}"
        return f"{found[0]:#.4g} to {found[1]:#.4g}"

    def _around(self, row: Comparison) -> str:
        """Half of a row's interval, behind what it is of."""
        found = self.interval(row)
        if found is None or row.kind == "fine-tuned":
            return ""
        half = (found[1] - found[0]) / 2
        return f" ± {100 * half:.2f}" if self.by_share or row.scores.percent else f" ± {half:.3g}"

    def _flat(self, row: Comparison) -> dict[str, Any]:
        scores = row.scores
        low, high = self.interval(row) or (None, None)
        if not self.by_share and scores.lower and low is not None and high is not None:
            low, high = -high, -low
        task, least = scores.worst or (None, None)
        counts = [scores.of(each).rows for each in scores.values]
        known = [count for count in counts if count is not None]
        return {
            "name": row.name,
            "settings": row.settings,
            "kind": row.kind,
            "nbytes": row.nbytes,
            "total_nbytes": row.total_nbytes,
            "ratio": row.ratio,
            "bits_per_parameter": row.bits_per_parameter,
            "encode_seconds": row.encode_seconds,
            "switch_seconds": row.switch_seconds,
            "spread": row.spread,
            "mean_score": None if math.isnan(scores.mean) else scores.mean,
            "share": scores.share,
            "interval_of": "share" if self.by_share else "score",
            "low": low,
            "high": high,
            "within_noise_of_best": self.within_noise(row),
            "worst_task": task,
            "worst_share": least,
            "rows": sum(known) if len(known) == len(counts) else None,
            "limit": scores.limit,
            **{f"metric/{each}": scores.of(each).facts.name for each in scores.values},
            **{f"score/{each}": value for each, value in scores.values.items()},
        }

    def _note(self) -> str:
        """What is to be known of the numbers."""
        notes = []
        limits = dict.fromkeys(row.scores.limit for row in self.rows if row.scores.limit)
        notes += [f"Only a part of the rows was scored: {limit}." for limit in limits]
        if any(row.scores.lower for row in self.rows):
            notes.append(GAP)
        return " ".join(notes)

    def _samples(self, row: Comparison) -> Tensor | None:
        """What rows are ranked by, `(RESAMPLES,)`, over rows that are resampled alike."""
        scores, finetuned = row.scores, self.row("fine-tuned")
        own = scores.resampled
        if own is None:
            return None
        if not self.by_share:
            mean = torch.stack([*own.values()]).mean(0)
            return (-mean if scores.lower else mean) if scores.alike else None
        whole = finetuned.scores.resampled if finetuned else None
        if whole is None or not _same_rows(scores, finetuned):
            return None
        if scores.alike and not scores.lower:
            means = [torch.stack([each[task] for task in own]).mean(0) for each in (own, whole)]
            return means[0] / means[1]
        base = self.row("base")
        start = base.scores.resampled if base and _same_rows(scores, base) else None
        parts = []
        for task, values in own.items():
            if task not in scores.lower:
                parts.append(values / whole[task])
            elif start is None:
                return None
            else:
                parts.append((start[task] - values) / (start[task] - whole[task]))
        return torch.stack(parts).mean(0)


def _same_rows(scores: Scores, other: Comparison | None) -> bool:
    """Whether two were scored over as many rows, task by task."""
    return other is not None and all(
        scores.of(task).rows == other.scores.of(task).rows for task in scores.values
    )


def _worst(scores: Scores) -> str:
    found = scores.worst
    return "" if found is None else f"{found[0]} {100 * found[1]:.1f}%"
