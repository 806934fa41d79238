"""Scores of many tasks, and how they relate to the fine-tuned models' own."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scores:
    """Scores per task, and how they relate to the fine-tuned models' own.

    Attributes:
        values: task name → score, as its metric gives it.
        finetuned: task name → the fine-tuned model's own score; None where it is not known.
        lower: names of the tasks whose metric is better the lower it is; they have no share.
    """

    values: dict[str, float]
    finetuned: dict[str, float] | None = None
    lower: frozenset[str] = frozenset()

    @property
    def mean(self) -> float:
        """Mean over the tasks."""
        return sum(self.values.values()) / len(self.values)

    @property
    def finetuned_mean(self) -> float | None:
        """Mean of the fine-tuned models' own scores over the same tasks, where all are known."""
        own = [(self.finetuned or {}).get(task) for task in self.values]
        known = [score for score in own if score is not None]
        return sum(known) / len(known) if known and len(known) == len(own) else None

    @property
    def share(self) -> float | None:
        """Mean score as a share of the fine-tuned models' mean, over the same tasks."""
        return None if self.lower else _share(self.mean, self.finetuned_mean)

    def share_of(self, task: str) -> float | None:
        """One task's score as a share of its fine-tuned model's."""
        own = (self.finetuned or {}).get(task)
        return None if task in self.lower else _share(self.values[task], own)

    def logged(self, stage: str) -> dict[str, float]:
        """What loggers get: every task's score, their mean and share, as `stage/name`."""
        found = {**self.values, "mean": self.mean}
        if self.share is not None:
            found["share"] = self.share
        return {f"{stage}/{name}": value for name, value in found.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One row per task and one for the mean."""
        rows: list[dict[str, Any]] = [
            {
                "task": task,
                "score": score,
                "finetuned": (self.finetuned or {}).get(task),
                "share": self.share_of(task),
            }
            for task, score in self.values.items()
        ]
        mean = {"score": self.mean, "finetuned": self.finetuned_mean, "share": self.share}
        return [*rows, {"task": "mean", **mean}]


def _share(score: float, own: float | None) -> float | None:
    return score / own if own else None
