"""Language modelling: every token after those before it; or those of an answer alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torchmetrics import Metric

from fusionkit.errors import DataError
from fusionkit.tasks.language_metrics import (
    BitsPerByte,
    Perplexity,
    TokenAccuracy,
    TokenMetric,
)
from fusionkit.tasks.split_model import SplitModel
from fusionkit.tasks.task import Task

IGNORED = -100
"""The label of a token that does not count, as PyTorch and transformers have it."""


@dataclass(frozen=True)
class LanguageModeling(Task):
    """The tokens of a text, each after those before it: cross-entropy, bits per byte.

    Batches are mappings: `input_ids` and `attention_mask`, int64 `(B, L)`; `labels`, the same
    tokens, or `IGNORED` where they don't count; `bytes`, float32 `(B,)`, what part of the text is
    the row's. A student is compared to its teacher by KL(teacher ‖ student) of the next token's
    probabilities. Losses are means over the tokens that count.

    Where the model can be split, scores and what calibration asks are had without the logits of
    more than some tokens at once; see `SplitModel`.
    """

    def predict(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """Call a model that returns an object with `logits`.

        Returns:
            logits `(B, L - 1, vocabulary)`, of what is to come after each token; 0 where that does
            not count.
        """
        self.check(model, batch)
        logits: Tensor = model(**self.inputs(batch)).logits
        said = logits[:, :-1]
        counted = self.targets(batch) != IGNORED
        return said if counted.all() else said.where(counted[..., None], 0)

    def check(self, model: Callable[..., Any], batch: Any) -> None:
        """Check that a model reads so many tokens.

        Raises:
            DataError: they are more than it was made for.
        """
        check_context(model, batch["input_ids"].shape[1])

    def inputs(self, batch: Any) -> dict[str, Tensor]:
        """What a model is called with."""
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def targets(self, batch: Any) -> Tensor:
        """The tokens that outputs should say, or `IGNORED`: `(B, L - 1)`."""
        labels: Tensor = batch["labels"]
        return labels[:, 1:]

    def states(self, split: SplitModel, batch: Any) -> Tensor | None:
        """What a split model's head gets for each of the targets: `(B, L - 1, H)`."""
        states = split.states(**self.inputs(batch))
        return None if states is None else states[:, :-1]

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Cross-entropy, a mean over the tokens that count."""
        targets = self.targets(batch)
        return token_nats(outputs, targets).sum() / (targets != IGNORED).sum().clamp(min=1)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(teacher ‖ student), a mean over the tokens that count."""
        total, count = student.new_zeros((), dtype=torch.float32), 0
        for said, wanted in zip(student, teacher, strict=True):  # a row's logits are large enough
            counted = (wanted != 0).any(-1)
            total = total + _divergence(said[counted], wanted[counted])
            count += int(counted.sum())
        return total / max(count, 1)

    def loss_of(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """As `loss`."""
        if (said := self._said(model, batch)) is None:
            return super().loss_of(model, batch)
        split, states = said
        targets = self.targets(batch)
        nats = split.nats(states, targets[targets != IGNORED])
        return nats.sum() / max(len(nats), 1)

    def kept(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """What the teacher's head gets, of the tokens that count: `(N, H)`; or its logits."""
        said = self._said(model, batch)
        return super().kept(model, batch) if said is None else said[1]

    def distance(
        self, student: Callable[..., Any], batch: Any, kept: Tensor, teacher: Callable[..., Any]
    ) -> Tensor:
        """As `divergence`."""
        said, taught = self._said(student, batch), SplitModel.of(teacher)
        if said is None or taught is None:
            return super().distance(student, batch, kept, teacher)
        split, states = said
        wanted = kept.to(states.device)

        def apart(logits: Tensor, where: slice) -> Tensor:
            with torch.no_grad():
                theirs = taught.logits(wanted[where])
            return _divergence(logits, theirs)

        total = sum(split.each(states, apart), states.new_zeros((), dtype=torch.float32))
        return total / max(len(states), 1)

    def drawn(self, model: Callable[..., Any], batch: Any) -> Callable[[Generator], Tensor]:
        """Of the tokens that count."""
        if (said := self._said(model, batch)) is None:
            return super().drawn(model, batch)
        split, states = said

        def total(generator: Generator) -> Tensor:
            begun: dict[int, Tensor] = {}

            def signed(logits: Tensor, where: slice) -> Tensor:
                own = generator
                if where.start in begun:  # on the way back: the same again
                    own = Generator()
                    own.set_state(begun[where.start])
                begun.setdefault(where.start, own.get_state())
                signs = torch.randn(logits.shape, generator=own).to(logits)
                return (logits * signs).sum()

            return sum(split.each(states, signed), states.new_zeros(()))

        return total

    def answers(self, model: Any, batch: Any, outputs: Tensor | None = None) -> Tensor:
        """A row's nats, tokens that are the most likely ones, and tokens: `(B, 3)` float32."""
        targets = self.targets(batch)
        counted = targets != IGNORED
        said = self._said(model, batch) if outputs is None else None
        if said is None:
            logits = self.predict(model, batch) if outputs is None else outputs
            right = (logits.argmax(-1) == targets) & counted
            sums = token_nats(logits, targets).sum(-1), right.sum(-1), counted.sum(-1)
            return torch.stack([each.to(torch.float32) for each in sums], -1)
        split, states = said
        wanted, of_row = targets[counted], counted.nonzero()[:, 0]

        def scored(logits: Tensor, where: slice) -> Tensor:
            right = (logits.argmax(-1) == wanted[where]).to(torch.float32)
            nats = nn.functional.cross_entropy(
                logits.to(torch.float32), wanted[where], reduction="none"
            )
            return torch.stack([nats, right, torch.ones_like(right)], -1)

        rows = states.new_zeros((len(targets), 3), dtype=torch.float32)
        return rows.index_add(0, of_row, torch.cat([rows[:0], *split.each(states, scored)]))

    def metric(self) -> Metric:
        """Bits per byte."""
        return BitsPerByte()

    @property
    def metrics(self) -> Mapping[str, type[Metric]]:
        """Those of tokens."""
        return {each.__name__: each for each in (BitsPerByte, Perplexity, TokenAccuracy)}

    def update(self, metric: Metric, outputs: Tensor, batch: Any) -> None:
        """With the rows' sums, and their bytes."""
        if not isinstance(metric, TokenMetric):
            raise TypeError(f"expected one of {', '.join(self.metrics)}")
        metric.update(outputs, batch["bytes"])

    def row_scores(self, metric: Metric, outputs: Tensor, batch: Any) -> Tensor | None:
        """Of bits per byte and token accuracy: a row's own."""
        return metric.rows(outputs, batch["bytes"]) if isinstance(metric, TokenMetric) else None

    def example(self) -> tuple[Tensor, Any] | None:
        """Two rows of three tokens, four bytes."""
        return torch.tensor([[2.0, 1.0, 3.0], [4.0, 0.0, 3.0]]), {"bytes": torch.full((2,), 4.0)}

    def count(self, batch: Any) -> int:
        """How many rows there are."""
        return len(batch["input_ids"])

    def _said(self, model: Callable[..., Any], batch: Any) -> tuple[SplitModel, Tensor] | None:
        """A split model, and what its head gets of the tokens that count: `(N, H)`."""
        split = SplitModel.of(model)
        if split is None:
            return None
        self.check(model, batch)
        states = self.states(split, batch)
        return None if states is None else (split, states[self.targets(batch) != IGNORED])


@dataclass(frozen=True)
class TextToText(LanguageModeling):
    """An answer's tokens, by an encoder-decoder that has read the prompt.

    Batches are as of `LanguageModeling`, but that `labels` `(B, T)` are the decoder's alone.
    """

    def predict(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """Call a model that returns an object with `logits`.

        Returns:
            logits `(B, T, vocabulary)`; 0 where a token does not count.
        """
        self.check(model, batch)
        logits: Tensor = model(**self.inputs(batch), labels=batch["labels"]).logits
        counted = batch["labels"] != IGNORED
        return logits if counted.all() else logits.where(counted[..., None], 0)

    def check(self, model: Callable[..., Any], batch: Any) -> None:
        """As of `LanguageModeling`; of prompts and of answers."""
        check_context(model, max(batch["input_ids"].shape[1], batch["labels"].shape[1]))

    def states(self, split: SplitModel, batch: Any) -> Tensor | None:
        """What a split model's head gets for each of the labels: `(B, T, H)`."""
        return split.states(**self.inputs(batch), labels=batch["labels"])

    def targets(self, batch: Any) -> Tensor:
        """The labels as they are."""
        labels: Tensor = batch["labels"]
        return labels


def check_context(model: Any, tokens: int) -> None:
    """Check that a model reads so many tokens.

    Raises:
        DataError: they are more than it was made for.
    """
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(most, int) and tokens > most:
        raise DataError(
            f"rows of {tokens} tokens are longer than the model's context, {most}; give "
            f"`max_length: {most}`, and `cut: left` where prompts are longer"
        )


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """What each token takes, −ln p; 0 where it does not count.

    Args:
        logits: `(B, L, vocabulary)`, of any floating dtype.
        targets: int64 `(B, L)`, tokens or `IGNORED`.

    Returns:
        float32 `(B, L)`.
    """
    rows = [
        nn.functional.cross_entropy(
            said.to(torch.float32), wanted, reduction="none", ignore_index=IGNORED
        )
        for said, wanted in zip(logits, targets, strict=True)
    ]
    return torch.stack(rows)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of tokens' logits `(N, vocabulary)`, a sum over the tokens: float32."""
    ours, theirs = (each.to(torch.float32).log_softmax(-1) for each in (student, teacher))
    return nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
