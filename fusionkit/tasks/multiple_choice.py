"""Multiple choice: which of some answers a language model finds the most likely."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fusionkit.tasks import batches
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.language_metrics import NormalizedAccuracy
from fusionkit.tasks.language_modeling import IGNORED, check_context, token_nats
from fusionkit.tasks.split_model import SplitModel

_NEVER = -1e9
"""The log-likelihood of a choice that a row has not: finite, so that differences stay numbers."""


@dataclass(frozen=True)
class MultipleChoice(Classification):
    """One of several answers to a prompt, by their log-likelihoods after it: accuracy.

    Batches are mappings: `input_ids` and `attention_mask`, int64 `(B, C, L)`, a prompt with each of
    its choices; `answers`, the same tokens where they are the choice's, else -100; `tokens` and
    `bytes`, float32 `(B, C)`, the choices' lengths; `labels`, int64 `(B,)`. Of a choice that a row
    has not, no token is an answer's.

    Args:
        num_classes: choices of the row that has the most.
    """

    def predict(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """Call a model that returns an object with `logits`; in pieces, where it can be split.

        Returns:
            log-likelihoods `(B, C)` float32, summed over a choice's tokens.
        """
        shape = batch["input_ids"].shape
        flat = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
        check_context(model, shape[-1])
        targets = batch["answers"].flatten(0, 1)[:, 1:]
        counted = targets != IGNORED
        split = SplitModel.of(model)
        states = split.states(**flat) if split else None
        if split is None or states is None:
            first = int(counted.any(0).int().argmax())  # before it are prompts alone
            logits = model(**flat).logits[:, first:-1]
            found = -token_nats(logits, targets[:, first:]).sum(-1)
        else:
            nats = split.nats(states[:, :-1][counted], targets[counted])
            found = nats.new_zeros(len(targets)).index_add(0, counted.nonzero()[:, 0], -nats)
        there = counted.any(-1)
        return found.where(there, _NEVER).reshape(shape[:2])

    def update(self, metric: Metric, outputs: Tensor, batch: Any) -> None:
        """As a classification, whose logits the log-likelihoods are."""
        if isinstance(metric, NormalizedAccuracy):
            metric.update(outputs, batch[metric.by], self.labels(batch))
        else:
            super().update(metric, outputs, batch)

    def row_scores(self, metric: Metric, outputs: Tensor, batch: Any) -> Tensor | None:
        """Of either accuracy: 1 where a row is right, else 0."""
        if isinstance(metric, NormalizedAccuracy):
            return metric.rows(outputs, batch[metric.by], self.labels(batch))
        return super().row_scores(metric, outputs, batch)

    def example(self) -> tuple[Tensor, Any] | None:
        """As of a classification; all choices are as long."""
        found = super().example()
        if found is None:
            return None
        outputs, (_, labels) = found
        sizes = torch.ones_like(outputs)
        return outputs, {"bytes": sizes, "tokens": sizes, "labels": labels}

    @property
    def metrics(self) -> Mapping[str, type[Metric]]:
        """The accuracy by length."""
        return {"NormalizedAccuracy": NormalizedAccuracy}

    @property
    def head_size(self) -> None:
        """The model's own head does."""
        return

    def first(self, batch: Any, rows: int) -> Any:
        """A batch's first rows."""
        return batches.first(batch, rows, self.count(batch))
