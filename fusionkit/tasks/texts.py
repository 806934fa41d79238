"""Labelled texts."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusionkit.checkpoints.hub_names import Use, reads_hub
from fusionkit.checkpoints.paths import written_out
from fusionkit.errors import DataError, meant
from fusionkit.tasks.class_names import Classes, Labels, checked_labels, classes_of
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.columns import label_column, text_columns
from fusionkit.tasks.data import ListedRows, Split, Splits, TaskData, checked_splits
from fusionkit.tasks.models import tokenizer_of
from fusionkit.tasks.regression import Regression
from fusionkit.tasks.table import MissingSplitError, Table
from fusionkit.tasks.table_files import read_table


@reads_hub(tasks=Use.ROWS, tokenizer=Use.BESIDE)
class TextData(TaskData):
    """Base of datamodules of texts: a folder of files for each task, or a Hugging Face data set.

    Where a task's rows are, is: a folder with `train` and `test` files; or a path with `{split}`
    in its name, which stands for either; or a file, whose rows are test rows; or a folder that
    `datasets` saved, or would load; or, where nothing lies there, a data set's name on the hub,
    `ORG/NAME` or `ORG/NAME:CONFIG`. Files are `.csv` and `.tsv` with a header, `.jsonl` and
    `.json` (objects), `.txt` and `.tsv.gz` (`label<TAB>text` lines, neither header nor quotes),
    and, with `pip install 'fusionkit[datasets]'`, `.parquet` and `.arrow`.

    Batches are mappings: what the tokenizer makes (`input_ids`, `attention_mask`, …), int64
    `(B, L)` padded to the longest of the batch, and `labels`, `(B,)`.

    Args:
        tasks: task name → where its rows are.
        tokenizer: folder or hub name of a Hugging Face tokenizer, or `package:NAME/FOLDER`.
        batch_size: rows per batch.
        max_length: tokens to which texts are cut.
        val_fraction: share of the training rows kept for validation, in [0, 1).
        limit: at most so many rows per task and split; all by default.
        num_workers: loading processes per dataloader.
        seed: of the draws.
        text: column of the texts, or two, of pairs; by default as it is commonly called.
        label: column of the labels; by default as it is commonly called.
        splits: `train` and `test` → what they are called; by default so, or `validation` for
            `test` where there is no other. A task's name → the same, of that task alone: `{test:
            validation, mnli: {test: validation_matched}}`.
    """

    def __init__(
        self,
        tasks: dict[str, str],
        tokenizer: str,
        batch_size: int = 64,
        max_length: int = 64,
        val_fraction: float = 0.1,
        limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        text: str | list[str] | None = None,
        label: str | None = None,
        splits: Splits | None = None,
    ) -> None:
        super().__init__(tasks, batch_size, val_fraction, limit, num_workers, seed)
        self.max_length = max_length
        self.text = text
        self.label = label
        self.splits = checked_splits(splits, tasks)
        self._tokenizer_path = written_out(tokenizer)
        self._tokenizer: Any = None

    @abstractmethod
    def labelled(self, task: str, table: Table) -> tuple[list[Any], list[Sequence[str]]]:
        """A table's rows: their labels as numbers; and their texts, each one or a pair.

        Raises:
            DataError: a row can't be read so.
        """

    def table(self, task: str, split: Split) -> Table:
        """One split's rows as they lie there.

        Raises:
            DataError: they can't be read.
        """
        return read_table(self.paths[task], split, self.called(task))

    def texts(self, table: Table) -> list[Sequence[str]]:
        """A table's texts, each one or a pair.

        Raises:
            DataError: it has no such columns, or they hold something else.
        """
        names = text_columns(table, self.text, label_column(table, self.label))
        columns = [table.column(name) for name in names]
        for name, column in zip(names, columns, strict=True):
            for row, text in enumerate(column):
                if not isinstance(text, str):
                    raise DataError(
                        f"{table.at(row)}: expected a text in column '{name}', got "
                        f"{type(text).__name__}; `text` chooses another column"
                    )
        return list(zip(*columns, strict=True))

    def read(self, task: str, split: Split) -> Dataset[dict[str, Any]]:
        """All rows, tokenized once."""
        labels, texts = self.labelled(task, self.table(task, split))
        columns = [list(column) for column in zip(*texts, strict=True)]
        tokens = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
        return ListedRows(
            [
                {**{key: tokens[key][place] for key in tokens}, "labels": label}
                for place, label in enumerate(labels)
            ]
        )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self._tokenizer_path)
            if self._tokenizer.pad_token is None:  # GPT-2, Llama: by masks, it is not seen
                self._tokenizer.pad_token = self._tokenizer.eos_token
        return self._tokenizer

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad to the longest of the batch."""
        texts = [{key: row[key] for key in row if key != "labels"} for row in rows]
        batch = self.tokenizer.pad(texts, return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    def order(self, dataset: Any, rows: list[int]) -> list[int]:
        """By length, so that batches pad little: several times faster than as they come."""
        return sorted(rows, key=lambda row: len(dataset[row]["input_ids"]))


class TextClassification(TextData):
    """Labelled texts; see `TextData` for what can be read, and how.

    Labels are names of classes, or whole numbers, which are the classes' own from 0 on.

    Args:
        tasks: task name → where its rows are.
        tokenizer: folder or hub name of a Hugging Face tokenizer, or `package:NAME/FOLDER`.
        labels: task name → its classes, in the order of the head's rows: names; or a JSON file
            `{"labels": [...]}`, or a fine-tuned model's folder whose `config.json` names them. By
            default what the data set calls its classes, or the labels of the training rows, of the
            test rows where there are no others, sorted.
        batch_size: rows per batch.
        max_length: tokens to which texts are cut.
        val_fraction: share of the training rows kept for validation, in [0, 1).
        limit: at most so many rows per task and split; all by default.
        num_workers: loading processes per dataloader.
        seed: of the draws.
        text: column of the texts, or two, of pairs; by default as it is commonly called.
        label: column of the labels; by default as it is commonly called.
        splits: `train` and `test` → what they are called; see `TextData`.
        numbers: tasks whose labels are numbers to be met, and no classes; as of `TextRegression`.

    Attributes:
        labels: task name → its classes' names; of `numbers` there are none.
        num_classes: task name → number of classes.

    Raises:
        DataError: rows are missing or malformed, there is no such column or task, or a label is
            not known.
    """

    def __init__(
        self,
        tasks: dict[str, str],
        tokenizer: str,
        labels: dict[str, str | list[str]] | None = None,
        batch_size: int = 64,
        max_length: int = 64,
        val_fraction: float = 0.1,
        limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        text: str | list[str] | None = None,
        label: str | None = None,
        splits: Splits | None = None,
        numbers: list[str] | None = None,
    ) -> None:
        size = (batch_size, max_length, val_fraction, limit, num_workers, seed)
        super().__init__(tasks, tokenizer, *size, text, label, splits)
        heads = checked_labels(labels, tasks)
        if unknown := [task for task in numbers or () if task not in tasks]:
            raise DataError(
                f"numbers: there is no task '{unknown[0]}'{meant(unknown[0], tasks) or ';'} there "
                f"is {', '.join(tasks)}"
            )
        classes = [task for task in self.tasks if task not in (numbers or ())]
        self._classes = {task: self._classes_of(task, heads.get(task)) for task in classes}
        self.labels = {task: classes.names for task, classes in self._classes.items()}
        self.num_classes = {task: len(names) for task, names in self.labels.items()}
        self.kinds = {
            task: Classification(self.num_classes[task]) if task in classes else Regression()
            for task in self.tasks
        }

    def labelled(self, task: str, table: Table) -> tuple[list[Any], list[Sequence[str]]]:
        """Places among the task's classes, or numbers, and texts."""
        if task not in self._classes:
            return _numbered(table, self.label, self.texts(table))
        classes = self._classes[task]
        labels = table.labels(label_column(table, self.label))
        places = [classes.place(label, table.at(row)) for row, label in enumerate(labels)]
        return places, self.texts(table)

    def _classes_of(self, task: str, head: Labels | None) -> Classes:
        try:
            table = self.table(task, "train")
        except MissingSplitError:
            table = self.table(task, "test")
        name = label_column(table, self.label)
        text_columns(table, self.text, name)  # now, not when they are tokenized
        named = (table.classes or {}).get(name)
        gzipped = table.where.endswith(".tsv.gz")
        return classes_of(task, table.labels(name), table.at, head, named, numbers=not gzipped)


class TextRegression(TextData):
    """Texts or pairs of texts with a number each; see `TextData` for what can be read, and how.

    A `.tsv.gz` or `.txt` file, `number<TAB>text[<TAB>text]`, has pairs if its first line has two
    texts. Labels are float32.

    Args:
        tasks: task name → where its rows are.
        tokenizer: folder or hub name of a Hugging Face tokenizer, or `package:NAME/FOLDER`.
        batch_size: rows per batch.
        max_length: tokens to which texts are cut.
        val_fraction: share of the training rows kept for validation, in [0, 1).
        limit: at most so many rows per task and split; all by default.
        num_workers: loading processes per dataloader.
        seed: of the draws.
        text: column of the texts, or two, of pairs; by default as it is commonly called.
        label: column of the numbers; by default as it is commonly called.
        splits: `train` and `test` → what they are called; see `TextData`.

    Raises:
        DataError: rows are missing, or a row is not a number and its texts.
    """

    def __init__(
        self,
        tasks: dict[str, str],
        tokenizer: str,
        batch_size: int = 64,
        max_length: int = 64,
        val_fraction: float = 0.1,
        limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        text: str | list[str] | None = None,
        label: str | None = None,
        splits: Splits | None = None,
    ) -> None:
        size = (batch_size, max_length, val_fraction, limit, num_workers, seed)
        super().__init__(tasks, tokenizer, *size, text, label, splits)
        self.kinds = {task: Regression() for task in self.tasks}

    def labelled(self, task: str, table: Table) -> tuple[list[float], list[Sequence[str]]]:
        """Numbers, and texts or pairs."""
        return _numbered(table, self.label, self.texts(table))


def _numbered(
    table: Table, label: str | None, texts: list[Sequence[str]]
) -> tuple[list[float], list[Sequence[str]]]:
    """A table's labels as numbers; and its texts, each one or a pair."""
    labels = table.labels(label_column(table, label))
    if table.headless:
        texts = [text.split("\t") for (text,) in texts]
    numbers: list[float] = []
    for row, (said, parts) in enumerate(zip(labels, texts, strict=True)):
        try:
            number = float(said)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or len(parts) != len(texts[0][:2]):
            raise DataError(
                f"{table.at(row)}: expected a number and as many texts as in the first "
                f"row, one or two; got '{said}' and {len(parts)} texts"
            )
        numbers.append(number)
    return numbers, texts
