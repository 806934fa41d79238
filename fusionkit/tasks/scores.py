"""Scores of many tasks, and how they relate to the base's and the fine-tuned models' own."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fusionkit.tasks.facts import Facts
from fusionkit.tasks.resample import Interval, interval, resampled_means

GAP = (
    "Where lower is better, a share is the part of the base's gap that is closed: "
    "(base − score) / (base − fine-tuned)."
)
"""What a share is of an error, said wherever one is shown."""


_RIGHT = Facts("", True, 0.0, 1.0)
"""Of a score of which nothing is known: a share of right answers."""


@dataclass(frozen=True)
class Measured:
    """How a task was scored.

    Attributes:
        facts: of the metric that counts.
        rows: how many rows were scored; None where that is not known.
        others: the task's other metrics, name → value.
        row_scores: `(rows,)` float32, each row's own score, whose mean is the task's; None where
            the metric is no mean over rows.
    """

    facts: Facts = _RIGHT
    rows: int | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    row_scores: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def lower(self) -> bool:
        """Whether less is better."""
        return self.facts.higher_is_better is False


_UNKNOWN = Measured()


@dataclass(frozen=True)
class Scores:
    """Scores per task, and how they relate to the base's and the fine-tuned models' own.

    Attributes:
        values: task name → score, as its metric gives it.
        finetuned: task name → the fine-tuned model's own score; None where it is not known.
        base: task name → what the base scores, with the task's own head; None likewise.
        measured: task name → how it was scored.
        limit: what kept rows from being scored, as it was asked for; empty where all were.
    """

    values: dict[str, float]
    finetuned: dict[str, float] | None = None
    base: dict[str, float] | None = None
    measured: dict[str, Measured] = field(default_factory=dict)
    limit: str = ""

    def of(self, task: str) -> Measured:
        """How a task was scored; one of which nothing is known, by a share of right answers."""
        return self.measured.get(task, _UNKNOWN)

    @property
    def lower(self) -> frozenset[str]:
        """The tasks whose metric is better the lower it is."""
        return frozenset(task for task in self.values if self.of(task).lower)

    @property
    def alike(self) -> bool:
        """Whether the tasks' scores have a mean: one way is better for all, in one unit."""
        found = [self.of(task) for task in self.values]
        same = len({each.facts.name for each in found}) == 1
        unit = same or all(each.facts.within_one for each in found)
        return unit and len({each.lower for each in found}) == 1

    @property
    def percent(self) -> bool:
        """Whether the mean may be told in percent: all scores lie in [0, 1]."""
        return all(self.of(task).facts.percent for task in self.values)

    @property
    def mean(self) -> float:
        """Mean over the tasks; not a number where their scores have none."""
        return sum(self.values.values()) / len(self.values) if self.alike else math.nan

    @property
    def finetuned_mean(self) -> float | None:
        """Mean of the fine-tuned models' own scores over the same tasks, where all are known."""
        own = [(self.finetuned or {}).get(task) for task in self.values]
        known = [score for score in own if score is not None]
        return sum(known) / len(known) if known and len(known) == len(own) and self.alike else None

    @property
    def share(self) -> float | None:
        """Mean score as a share of the fine-tuned models' mean, over the same tasks.

        Where lower is better, or scores have no mean: the mean of the tasks' shares.
        """
        if self.alike and not self.lower:
            return _part(self.mean, self.finetuned_mean)
        found = [self.share_of(task) for task in self.values]
        known = [share for share in found if share is not None]
        return sum(known) / len(known) if known and len(known) == len(found) else None

    def share_of(self, task: str) -> float | None:
        """One task's score as a share of its fine-tuned model's; of an error, see `GAP`."""
        own, base = (self.finetuned or {}).get(task), (self.base or {}).get(task)
        if not self.of(task).lower:
            return _part(self.values[task], own)
        if own is None or base is None or base <= own:
            return None
        return (base - self.values[task]) / (base - own)

    @property
    def worst(self) -> tuple[str, float] | None:
        """The task of the least share, and that; None where no share is known."""
        shares = {task: self.share_of(task) for task in self.values}
        known = {task: share for task, share in shares.items() if share is not None}
        return min(known.items(), key=lambda each: each[1]) if known else None

    def interval(self, task: str | None = None) -> Interval | None:
        """Where a task's score, or the mean, lies with 95% confidence, from resampled rows.

        Args:
            task: which; None: the mean over the tasks.

        Returns:
            None where a metric is no mean over rows.
        """
        if task is None:
            found = self.resampled
            usable = found is not None and self.alike
            return interval(torch.stack([*found.values()]).mean(0)) if found and usable else None
        own = self._resampled.get(task)
        return None if own is None else interval(own)

    @property
    def resampled(self) -> dict[str, Tensor] | None:
        """Task → its score over resampled rows, `(RESAMPLES,)`; None if not known of all tasks."""
        found = self._resampled
        return dict(found) if len(found) == len(self.values) else None

    @cached_property
    def _resampled(self) -> dict[str, Tensor]:
        rows = {task: self.of(task).row_scores for task in self.values}
        return {
            task: resampled_means(task, own[:, None])[:, 0]
            for task, own in rows.items()
            if own is not None
        }

    def logged(self, stage: str) -> dict[str, float]:
        """What loggers get: every task's scores, their mean and share, as `stage/name`."""
        found = dict(self.values)
        for task in self.values:
            others = self.of(task).others.items()
            found.update({f"{task}/{name}": value for name, value in others})
        if self.alike:
            found["mean"] = self.mean
        if self.share is not None:
            found["share"] = self.share
        return {f"{stage}/{name}": value for name, value in found.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One row per task and one for the mean."""
        rows: list[dict[str, Any]] = [
            {
                "task": task,
                "metric": self.of(task).facts.name,
                "score": score,
                **_ends(self.interval(task)),
                "rows": self.of(task).rows,
                "finetuned": (self.finetuned or {}).get(task),
                "base": (self.base or {}).get(task),
                "share": self.share_of(task),
            }
            for task, score in self.values.items()
        ]
        counts = [each["rows"] for each in rows]
        mean = {
            "task": "mean",
            "metric": "",
            "score": self.mean if self.alike else None,
            **_ends(self.interval()),
            "rows": None if None in counts else sum(counts),
            "finetuned": self.finetuned_mean,
            "base": None,
            "share": self.share,
        }
        return [*rows, mean]


def _ends(found: Interval | None) -> dict[str, float | None]:
    low, high = found or (None, None)
    return {"low": low, "high": high}


def _part(score: float, own: float | None) -> float | None:
    return score / own if own is not None and own > 0 else None
