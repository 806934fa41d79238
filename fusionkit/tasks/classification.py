"""Classification: one of several classes per row."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

from fusionkit.tasks.task import LabelledTask

_TRIED = 32
"""Classes of an example, at most."""


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
            outputs = _second(outputs)
        metric.update(outputs, self.labels(batch))

    def predictions(self, outputs: Tensor, batch: Any) -> list[dict[str, Any]]:
        """The most likely class, all classes' probabilities, and the label."""
        likely = outputs.to(torch.float32).softmax(-1)
        rows = zip(likely.argmax(-1).tolist(), likely.tolist(), strict=True)
        targets = self.labels(batch).tolist()
        return [
            {"prediction": said, "probabilities": each, "target": target}
            for (said, each), target in zip(rows, targets, strict=True)
        ]

    def row_scores(self, metric: Metric, outputs: Tensor, batch: Any) -> Tensor | None:
        """Of accuracy over all rows: 1 where a row is right, else 0."""
        settings = vars(metric)
        if settings.get("multidim_average") != "global" or settings.get("ignore_index") is not None:
            return None
        if type(metric) is BinaryAccuracy:
            said = _second(outputs) > settings["threshold"]
        elif type(metric) is MulticlassAccuracy and (metric.average, metric.top_k) == ("micro", 1):
            said = outputs.argmax(-1)
        else:
            return None
        right: Tensor = said == self.labels(batch)
        return right.to(torch.float32)

    def example(self) -> tuple[Tensor, Any] | None:
        """Logits of some rows, two of each class, the first of each right."""
        if not self.num_classes:
            return None
        labels = torch.arange(2 * min(self.num_classes, _TRIED)) % self.num_classes
        said = labels.clone()
        said[len(labels) // 2 :] = said[len(labels) // 2 :].roll(1)
        return torch.eye(self.num_classes)[said], (None, labels)

    @property
    def metric_arguments(self) -> dict[str, Any]:
        """The number of classes, and that there may be more than two."""
        return {"task": "multiclass", "num_classes": self.num_classes}

    @property
    def head_size(self) -> int | None:
        """A logit per class."""
        return self.num_classes


def _second(outputs: Tensor) -> Tensor:
    """The second class's probability, `(B,)`."""
    return outputs.to(torch.float32).softmax(-1)[:, 1]
