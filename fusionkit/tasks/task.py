"""The one meaning of a task, which evaluation, calibration, fine-tuning and fusion share.

A datamodule says of what kind each of its tasks is, in `kinds`: the task's name → a `Task`. One
that has `num_classes` alone, the number of classes by name, is about classification. A kind to
come is a class that writes what is abstract here, in a file of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor
from torchmetrics import Metric

from fusionkit.tasks import batches


class Task(ABC):
    """How a model is called on a task's batches, and how what it says is scored and compared."""

    @abstractmethod
    def predict(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """Call a model on a batch.

        Returns:
            its outputs, `(B, …)`: one entry of the first axis per row.
        """

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """The task's own loss, a mean over the rows: float32, no axes."""

    @abstractmethod
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """How far a student's outputs are from its teacher's, a mean over the rows; no labels.

        Returns:
            float32, no axes; 0 where they say the same.
        """

    def answers(self, model: Any, batch: Any, outputs: Tensor | None = None) -> Tensor:
        """What is scored of a model on a batch: its outputs, where a kind doesn't say otherwise.

        Args:
            model: the model itself.
            batch: one of the task's.
            outputs: its outputs, where they are known.

        Returns:
            `(B, …)`: one entry of the first axis per row.
        """
        return self.predict(model, batch) if outputs is None else outputs

    def loss_of(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """The loss of a model on a batch: float32, no axes.

        This and the next three are what calibration asks. A kind whose outputs are too large to be
        there at once writes them anew.
        """
        return self.loss(self.predict(model, batch), batch)

    def kept(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """What is kept of a teacher, for students to be compared to: its outputs."""
        return self.predict(model, batch)

    def distance(
        self, student: Callable[..., Any], batch: Any, kept: Tensor, teacher: Callable[..., Any]
    ) -> Tensor:
        """How far a student is from its teacher on a batch, as `divergence` has it.

        Args:
            student: differentiable in its weights.
            batch: one of the task's.
            kept: what was kept of the teacher on it.
            teacher: a model that has the teacher's head; the rest of it may be another's.
        """
        said = self.predict(student, batch)
        return self.divergence(said, kept.to(said.device))

    def drawn(self, model: Callable[..., Any], batch: Any) -> Callable[[Generator], Tensor]:
        """A model's outputs on a batch, each times a normal draw, summed.

        Returns:
            what draws, and gives the sum: no axes, differentiable in the model's weights.
        """
        said = self.predict(model, batch)
        return lambda generator: (
            said * torch.randn(said.shape, generator=generator).to(said)
        ).sum()

    @abstractmethod
    def metric(self) -> Metric:
        """The metric by which tasks of this kind are scored, where no other is asked for."""

    def others(self) -> Mapping[str, Metric]:
        """Fresh metrics that are told beside `metric`, where no other is asked for: by name."""
        return {}

    @abstractmethod
    def update(self, metric: Metric, outputs: Tensor, batch: Any) -> None:
        """Let a metric take in what is scored of a batch: `answers`."""

    @property
    def metrics(self) -> Mapping[str, type[Metric]]:
        """Metrics of the kind's own, by the names that recipes may call them."""
        return {}

    def predictions(self, outputs: Tensor, batch: Any) -> list[dict[str, Any]]:
        """What is predicted of each row, as JSON has it: columns of a table of predictions.

        Args:
            outputs: what is scored of the batch: `answers`.
            batch: one of the task's.
        """
        return [{"outputs": row} for row in outputs.float().tolist()]

    def row_scores(self, metric: Metric, outputs: Tensor, batch: Any) -> Tensor | None:
        """What each row adds to a metric that is a mean over rows.

        Scores of the same rows by two models are then compared row by row, and how much of their
        difference may be chance is known.

        Returns:
            `(B,)` floats, whose mean over all rows is the metric; None where it is no such mean.
        """
        return None

    def beside(self, metric: Metric) -> Mapping[str, float]:
        """What else is known with a metric that has taken in batches: name → number."""
        return {}

    def example(self) -> tuple[Tensor, Any] | None:
        """Outputs and their batch as the task's may be, of a few rows, to try a metric on.

        None: that can't be known, and whether a metric is right shows in the first batch.
        """
        return None

    @property
    def metric_arguments(self) -> dict[str, Any]:
        """What a metric asked for by name is given, of its arguments that a recipe leaves out."""
        return {}

    @property
    def head_size(self) -> int | None:
        """Outputs of the head that a model needs; None where its own does for any task."""
        return None

    def count(self, batch: Any) -> int:
        """How many rows a batch has."""
        return batches.count(batch)

    def first(self, batch: Any, rows: int) -> Any:
        """A batch's first rows; of all of them, the batch itself."""
        count = self.count(batch)
        return batch if rows >= count else batches.first(batch, rows, count)


class LabelledTask(Task):
    """Base of tasks whose batches are `(x, y)`, or mappings of a model's arguments and `labels`."""

    def predict(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """Call a model that returns its outputs, or an object with `logits`."""
        if isinstance(batch, Mapping):
            output = model(**{key: value for key, value in batch.items() if key != "labels"})
        else:
            output = model(batch[0])
        return output if isinstance(output, Tensor) else output.logits

    def labels(self, batch: Any) -> Tensor:
        """A batch's labels, `(B,)`."""
        found: Tensor = batch["labels"] if isinstance(batch, Mapping) else batch[1]
        return found

    def count(self, batch: Any) -> int:
        """How many labels there are."""
        return len(self.labels(batch))
