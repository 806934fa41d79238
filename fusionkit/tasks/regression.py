"""Regression: a number per row, as the similarity of two sentences (STS-B)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import (
    MeanAbsoluteError,
    MeanSquaredError,
    Metric,
    PearsonCorrCoef,
    SpearmanCorrCoef,
)

from fusionkit.tasks.task import LabelledTask


@dataclass(frozen=True)
class Regression(LabelledTask):
    """A number per row: squared error; the mean of Pearson's and Spearman's correlation.

    GLUE scores STS-B so. A student is compared to its teacher by the squared difference of what
    they say. Labels are floats `(B,)`; a model's outputs `(B,)` or `(B, 1)`.
    """

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Mean squared error."""
        said = _numbers(outputs)
        return nn.functional.mse_loss(said, self.labels(batch).to(said))

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean squared difference."""
        said = _numbers(student)
        return nn.functional.mse_loss(said, _numbers(teacher).to(said))

    def metric(self) -> Metric:
        """(Pearson + Spearman) / 2."""
        return (PearsonCorrCoef() + SpearmanCorrCoef()) / 2

    def update(self, metric: Metric, outputs: Tensor, batch: Any) -> None:
        """With numbers, float32 `(B,)`."""
        said = _numbers(outputs)
        metric.update(said, self.labels(batch).to(said))

    def predictions(self, outputs: Tensor, batch: Any) -> list[dict[str, Any]]:
        """The number that is said, and the label."""
        rows = zip(_numbers(outputs).tolist(), self.labels(batch).tolist(), strict=True)
        return [{"prediction": said, "target": target} for said, target in rows]

    def row_scores(self, metric: Metric, outputs: Tensor, batch: Any) -> Tensor | None:
        """Of the mean squared or absolute error: a row's own."""
        said = _numbers(outputs)
        error = said - self.labels(batch).to(said)
        if type(metric) is MeanSquaredError and metric.squared:
            return error.square()
        return error.abs() if type(metric) is MeanAbsoluteError else None

    def example(self) -> tuple[Tensor, Any] | None:
        """Numbers of some rows, and labels not far from them."""
        labels = torch.linspace(0, 1, 8)
        return labels[[1, 0, 3, 2, 4, 6, 5, 7]].reshape(-1, 1), (None, labels)

    @property
    def head_size(self) -> int:
        """One output."""
        return 1


def _numbers(outputs: Tensor) -> Tensor:
    return outputs.to(torch.float32).reshape(len(outputs))
