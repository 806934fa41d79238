"""Scores of many tasks, and how they relate to the fine-tuned models' own."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scores:
    """Scores per task, in [0, 1], and how they relate to the fine-tuned models' own.

    Attributes:
        values: task name → score.
        finetuned: task name → the fine-tuned model's own score; None where it is not known.
    """

    values: dict[str, float]
    finetuned: dict[str, float] | None = None

    @property
    def mean(self) -> float:
        """Mean over the tasks."""
        return sum(self.values.values()) / len(self.values)

    @property
    def share(self) -> float | None:
        """Mean score as a share of the fine-tuned models' mean, over the same tasks."""
        if self.finetuned is None or any(task not in self.finetuned for task in self.values):
            return None
        return self.mean / (sum(self.finetuned[task] for task in self.values) / len(self.values))

    def share_of(self, task: str) -> float | None:
        """One task's score as a share of its fine-tuned model's."""
        own = (self.finetuned or {}).get(task)
        return self.values[task] / own if own else None

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
        own = None if self.share is None else self.mean / self.share
        return [*rows, {"task": "mean", "score": self.mean, "finetuned": own, "share": self.share}]
