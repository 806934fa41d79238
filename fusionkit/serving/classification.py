"""Rows of many tasks, classified in batches of what waits."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusionkit.errors import FusionKitError
from fusionkit.reuse.mixed_batch import MixedBatch
from fusionkit.serving.inputs import Input, Inputs
from fusionkit.serving.requests import Answer, Predict, Prediction, Ticket
from fusionkit.serving.served_tasks import ServedTask
from fusionkit.serving.work import Tally, answered, by_task


@dataclass(eq=False)
class Question:
    """A row to be classified.

    Attributes:
        ticket: whose.
        task: the task, or the base.
        input: what the model takes.
    """

    ticket: Ticket
    task: ServedTask
    input: Input


class Classification:
    """One model that classifies rows of any task.

    Args:
        model: the base, which `mixed` is of.
        mixed: answers each row by its task.
        inputs: makes rows ready.
        max_rows: how many rows are put into a batch.
        tally: counts what is done.
    """

    running: Sequence[Question] = ()
    cache_bytes = 0

    def __init__(
        self, model: nn.Module, mixed: MixedBatch, inputs: Inputs, max_rows: int, tally: Tally
    ) -> None:
        self._model, self._mixed, self._inputs, self._tally = model, mixed, inputs, tally
        self._max_rows = 1 if _pads_nothing(model) else max_rows

    def row(self, ticket: Ticket, task: ServedTask) -> Question:
        """A row for a request.

        Raises:
            RequestError: its inputs are nothing that the model takes.
        """
        asked = ticket.request
        assert isinstance(asked, Predict)
        return Question(ticket, task, self._inputs.row(task, asked.inputs))

    def choose(self, waiting: Sequence[Question]) -> list[Question]:
        """The oldest, and of those of its kind the ones that are most like it in length."""
        if not waiting:
            return []
        first = waiting[0].input
        alike = [each for each in waiting if each.input.kind == first.kind]
        alike.sort(key=lambda each: abs(each.input.length - first.length))
        return alike[: self._max_rows]

    def drop(self, rows: Collection[Question]) -> None:
        """None runs between steps."""

    def cancelled(self, row: Question) -> None:
        """Nothing is told."""

    def turn(self, rows: Sequence[Question]) -> list[tuple[Question, Answer]]:
        """What each row's task says of it; rows over which the model fails get the error."""
        told: list[tuple[Question, Answer]] = []
        if not rows:
            return told
        for part, found in answered(by_task(rows), self._called):
            if isinstance(found, Exception):
                told += [(row, found) for row in part]
            else:
                told += [
                    (row, self._said(row, each)) for row, each in zip(part, found, strict=True)
                ]
        return told

    def _called(self, rows: Sequence[Question]) -> Tensor:
        """Rows → logits, float32 `(rows, columns)`."""
        names = [row.task.name for row in rows]
        device = next(self._model.parameters()).device
        inputs = self._inputs.batch([row.input for row in rows])
        moved = {name: value.to(device) for name, value in inputs.items()}
        with torch.inference_mode(), self._mixed.rows(names):
            found = self._model(moved[""]) if "" in moved else self._model(**moved)
        logits = found if isinstance(found, Tensor) else found.logits
        if logits.ndim != 2 or len(logits) != len(rows):
            raise FusionKitError(
                f"expected a row of logits for each of {len(rows)} rows, got shape "
                f"{list(logits.shape)} of {type(self._model).__name__}; it classifies no rows"
            )
        self._tally.step(names)
        self._tally.predictions += len(rows)
        return logits.float().cpu()

    def _said(self, row: Question, logits: Tensor) -> Prediction:
        task, own = row.task, self._mixed.classes(row.task.name)
        logits = logits if own is None else logits[:own]
        if task.says == "number":
            return Prediction((), (), float(logits[0]), row.input.tokens)
        chances = logits.sigmoid() if task.says == "several" else logits.softmax(-1)
        labels = task.labels
        if labels is None or len(labels) != len(logits):
            labels = tuple(map(str, range(len(logits))))
        return Prediction(labels, tuple(chances.tolist()), None, row.input.tokens)


def _pads_nothing(model: nn.Module) -> bool:
    """Whether a model finds a text's last token by the padding, and knows of none."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "score"):
        return False
    return config.get_text_config().pad_token_id is None
