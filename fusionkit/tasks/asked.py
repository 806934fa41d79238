"""Labelled rows asked of a model that writes: a prompt with the row's columns, a word a class."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from fusionkit.errors import DataError
from fusionkit.tasks.class_names import label_text
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.columns import label_column
from fusionkit.tasks.generation import Generation
from fusionkit.tasks.glue import glue_task, is_glue
from fusionkit.tasks.regression import Regression
from fusionkit.tasks.table import Table
from fusionkit.tasks.task import Task
from fusionkit.tasks.text_metrics import TextMetric

NUMBER = "number"
"""Answers that are numbers, not words."""


@dataclass(frozen=True)
class Asked:
    """How a labelled row becomes a prompt and its completion.

    Attributes:
        prompt: with columns in braces: `Is this good? {sentence}`.
        words: what is answered, class by class; empty where it is a number, with one decimal.
        label: column of the labels; by default as it is commonly called.
    """

    prompt: str
    words: tuple[str, ...] = ()
    label: str | None = None

    @classmethod
    def of(cls, given: Any, task: str) -> "Asked":
        """What a setting says.

        Args:
            given: `glue` or `glue:NAME`; or `{prompt: …, answers: [word, …]}`, where `answers` may
                be `number`, and `label` names the column of the labels.
            task: whose it is.

        Raises:
            DataError: it says something else.
            FusionKitError: there is no such task of GLUE's.
        """
        if is_glue(given):
            known = glue_task(given, task)
            return cls(known.prompt, known.words)
        answers: Any = given.get("answers") if isinstance(given, Mapping) else None
        words: Any = () if answers == NUMBER else answers
        fits = isinstance(words, list | tuple) and all(isinstance(word, str) for word in words)
        if not fits or not isinstance(given.get("prompt"), str) or set(given) - _KEYS:
            raise DataError(
                f"asked: expected for task '{task}' {{prompt: 'Is it good? {{sentence}}', answers: "
                f"[no, yes]}}, or answers: {NUMBER}, or glue:NAME; got {given!r}"
            )
        if answers != NUMBER and (len(words) < 2 or len(set(words)) < len(words)):
            raise DataError(
                f"asked: task '{task}' needs a word for each of two or more classes, all of them "
                f"different, got {list(words)}"
            )
        return cls(given["prompt"], tuple(words), given.get("label"))

    def rows(self, table: Table) -> Table:
        """A table of `prompt` and `completion`.

        Raises:
            DataError: there is no such column, or a label is no class and no number.
        """
        names = [name for _, name, *_ in string.Formatter().parse(self.prompt) if name]
        columns = [table.column(table.check_column(name, "asked")) for name in names]
        label = label_column(table, self.label)
        table.labels(label)  # hidden ones are refused
        known = (table.classes or {}).get(label) or []
        answers = [self._answer(v, known, table.at(r)) for r, v in enumerate(table.column(label))]
        rows = [
            {
                "prompt": self.prompt.format(**dict(zip(names, cells, strict=True))),
                "completion": answer,
            }
            for answer, *cells in zip(answers, *columns, strict=True)
        ]
        lines = table.lines or range(1, len(rows) + 1)
        return Table(table.where, ("prompt", "completion"), rows, lines)

    def kind(self, tokenizer: Any, likelihood: Any, settings: Mapping[str, Any]) -> Task:
        """Of what kind such a task is; arguments as of `Generation`."""
        if self.words:
            return AnsweredClass(tokenizer, likelihood, settings, self.words)
        return AnsweredNumber(tokenizer, likelihood, settings)

    def _answer(self, label: Any, known: Sequence[str], at: str) -> str:
        said = label_text(label)
        if not self.words:
            try:
                return f"{float(label):.1f}"
            except (TypeError, ValueError) as error:
                raise DataError(f"{at}: expected a number as its label, got '{said}'") from error
        if said in self.words:
            return said
        place = known.index(said) if said in known else int(said) if said.isdecimal() else -1
        if not 0 <= place < len(self.words):
            raise DataError(
                f"{at}: label '{said}' is no class from 0 to {len(self.words) - 1}, and none of "
                f"the words that answer: {', '.join(self.words)}"
            )
        return self.words[place]


_KEYS = {"prompt", "answers", "label"}


@dataclass(frozen=True)
class AnsweredClass(Generation):
    """Classes that a model answers by words: accuracy, or any metric of classes.

    A word that is none of the classes' is wrong: for metrics of many classes one more class, for
    those of yes and no the class that is not the row's, as T5's authors count it.

    Args:
        tokenizer: as of `Generation`.
        likelihood: as of `Generation`.
        settings: as of `Generation`.
        words: the classes' words, in their order.
    """

    words: tuple[str, ...] = ()

    def metric(self) -> Metric:
        """Share of the rows whose word is the class's."""
        return self._classes.metric()

    @property
    def metric_arguments(self) -> dict[str, Any]:
        """The number of classes, and one for what is none."""
        return self._classes.metric_arguments

    def update(self, metric: Metric, outputs: Tensor, batch: Any) -> None:
        """With numbers of classes; a metric of texts gets texts."""
        if _of_texts(metric):
            super().update(metric, outputs, batch)
            return
        said, right = self.classes(outputs, batch)
        if type(metric).__name__.startswith("Binary"):
            said = torch.where(said < len(self.words), said, 1 - right)
        metric.update(said, right)

    def classes(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """The classes that are said, and those that are right: int64 `(B,)` each.

        Of what is no class's word, the first is the number of classes.
        """
        none = len(self.words)
        known = {word: place for place, word in enumerate(self.words)}
        said = [known.get(text, none) for text in self.texts(outputs)]
        right = [known[first] for first, *_ in batch["references"]]
        where = outputs.device
        return torch.tensor(said, device=where), torch.tensor(right, device=where)

    def row_scores(self, metric: Metric, outputs: Tensor, batch: Any) -> Tensor | None:
        """Of accuracy over all rows: 1 where a row is right, else 0."""
        if _of_texts(metric):
            return super().row_scores(metric, outputs, batch)
        said, right = self.classes(outputs, batch)
        logits = nn.functional.one_hot(said, len(self.words) + 1)
        return self._classes.row_scores(metric, logits, (None, right))

    @property
    def _classes(self) -> Classification:
        return Classification(len(self.words) + 1)


@dataclass(frozen=True)
class AnsweredNumber(Generation):
    """Numbers that a model answers as text: (Pearson + Spearman) / 2, or any metric of numbers.

    A text that is no number counts as 0, as in FusionBench.
    """

    def metric(self) -> Metric:
        """(Pearson + Spearman) / 2."""
        return Regression().metric()

    def update(self, metric: Metric, outputs: Tensor, batch: Any) -> None:
        """With numbers, float32 `(B,)`; a metric of texts gets texts."""
        if _of_texts(metric):
            super().update(metric, outputs, batch)
            return
        right = [float(first) for first, *_ in batch["references"]]
        metric.update(self.numbers(outputs), torch.tensor(right, device=outputs.device))

    def numbers(self, outputs: Tensor) -> Tensor:
        """The numbers that are said: float32 `(B,)`."""
        said = [_number(text) for text in self.texts(outputs)]
        return torch.tensor(said, device=outputs.device)


def _number(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        return 0.0
    return found if abs(found) < float("inf") else 0.0


def _of_texts(metric: Metric) -> bool:
    return isinstance(metric, TextMetric) or any(
        each.__module__.startswith("torchmetrics.text") for each in type(metric).__mro__
    )
