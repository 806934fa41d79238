"""Classification: how a classifier is called, and scored."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

MetricOfClasses = Callable[[int], Metric]
"""Number of classes → a fresh metric."""


def accuracy(num_classes: int) -> Metric:
    """Share of the rows whose most likely class is right."""
    return MulticlassAccuracy(num_classes=num_classes, average="micro")


def predict(model: Callable[..., Any], batch: Any) -> tuple[Tensor, Tensor]:
    """Call a classifier on a batch.

    Args:
        model: returns logits, or an object with `logits`.
        batch: `(x, y)`, or a mapping of the model's arguments and `labels`.

    Returns:
        logits `(B, classes)` and labels int64 `(B,)`.
    """
    if isinstance(batch, Mapping):
        labels = batch["labels"]
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
    else:
        inputs, labels = batch
        output = model(inputs)
    return output if isinstance(output, Tensor) else output.logits, labels
