"""Classification: one of several classes per row."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from fusionkit.tasks.task import LabelledTask


@dataclass(frozen=True)
class Classification(LabelledTask):
    """One of several classes per row: cross-entropy, accuracy.

    A student is compared to its teacher by KL(teacher ‖ student) of the class probabilities.

    Args:
        num_classes: how many classes there are; labels are int64, from 0. None: it is not known,
            and needed for metrics and heads alone.
    """

    num_classes: int | None

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Cross-entropy of logits `(B, classes)`."""
        return nn.functional.cross_entropy(outputs.to(torch.float32), self.labels(batch))

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(teacher ‖ student) of the class probabilities."""
        said, wanted = (each.to(torch.float32).log_softmax(-1) for each in (student, teacher))
        return nn.functional.kl_div(said, wanted, log_target=True, reduction="batchmean")

    def metric(self) -> Metric:
        """Share of the rows whose most likely class is right."""
        return MulticlassAccuracy(num_classes=self.num_classes, average="micro")

    def update(self, metric: Metric, outputs: Tensor, batch: Any) -> None:
        """With logits; of two classes, a metric of yes and no gets the second one's probability."""
        if type(metric).__name__.startswith("Binary"):
            outputs = outputs.to(torch.float32).softmax(-1)[:, 1]
        metric.update(outputs, self.labels(batch))

    @property
    def metric_arguments(self) -> dict[str, Any]:
        """The number of classes, and that there may be more than two."""
        return {"task": "multiclass", "num_classes": self.num_classes}

    @property
    def head_size(self) -> int | None:
        """A logit per class."""
        return self.num_classes
