"""Scores one task: its metrics, and the rows' own scores where what counts is their mean."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from fusionkit.tasks.metrics import MetricChoice, metrics_of, update
from fusionkit.tasks.scores import Measured
from fusionkit.tasks.task import Task

Found = tuple[int, Tensor, Tensor | None, Mapping[str, float]]
"""How many rows a process scored, their places among the task's, their own scores, and `beside`."""


class Scorer(nn.Module):
    """Takes in a task's batches, and says what they come to.

    Args:
        choice: what scores it; see `fusionkit.tasks.metrics.MetricChoice`.
        task: its name.
        kind: of what kind it is.

    Raises:
        FusionKitError: as for `metrics_of`.
    """

    def __init__(self, choice: MetricChoice, task: str, kind: Task) -> None:
        super().__init__()
        metrics, self.facts = metrics_of(choice, task, kind)
        self.task, self.kind = task, kind
        self.names = list(metrics)
        self.metrics = nn.ModuleList(metrics.values())
        self.reset()

    def reset(self) -> None:
        """Forget what was taken in."""
        for metric in self.metrics:
            cast(Metric, metric).reset()
        self._rows = 0
        self._places: list[Tensor] = []
        self._row_scores: list[Tensor] | None = []

    def update(self, outputs: Tensor, batch: Any, places: Tensor) -> None:
        """Take in a batch.

        Args:
            outputs: the model's, `(B, …)`.
            batch: what they are of.
            places: `(B,)` int64, of its rows among all rows of the task.
        """
        for metric in self.metrics:
            update(cast(Metric, metric), self.task, self.kind, outputs, batch)
        self._rows += len(places)
        own = self.kind.row_scores(cast(Metric, self.metrics[0]), outputs, batch)
        if own is None or self._row_scores is None or own.shape != places.shape:
            self._row_scores = None
            return
        self._places.append(places)
        self._row_scores.append(own.detach().to(torch.float32))

    def found(self) -> Found:
        """What this process took in."""
        none, beside = torch.empty(0), self.kind.beside(cast(Metric, self.metrics[0]))
        places = torch.cat([none.to(torch.int64), *self._places])
        if self._row_scores is None:
            return self._rows, places, None, beside
        own = [each.cpu() for each in self._row_scores]
        return self._rows, places, torch.cat([none, *own]), beside

    def compute(
        self, value: Callable[[Metric, str], float], found: list[Found]
    ) -> tuple[float, Measured]:
        """The score, and how it was measured.

        Args:
            value: what a metric has come to, over all processes.
            found: what each process took in.
        """
        values = [value(cast(Metric, metric), self.task) for metric in self.metrics]
        others = dict(zip(self.names[1:], values[1:], strict=True))
        for *_, beside in found:
            others.update(beside)
        rows = sum(count for count, *_ in found)
        own = _in_order(found, values[0])
        return values[0], Measured(self.facts, rows, others, own)


def _in_order(found: list[Found], score: float) -> Tensor | None:
    """The rows' own scores in the rows' order; None where the score is not their mean."""
    known = [own for _, _, own, _ in found if own is not None]
    if len(known) < len(found) or not sum(len(own) for own in known):
        return None
    places = torch.cat([places for _, places, *_ in found])
    ordered = torch.cat(known)[places.argsort()]
    mean = float(ordered.to(torch.float64).mean())
    return ordered if abs(mean - score) <= 1e-4 * max(1.0, abs(score)) else None
