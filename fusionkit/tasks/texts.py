"""Labelled texts."""

import gzip
import json
import math
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusionkit.checkpoints.paths import open_path, written_out
from fusionkit.errors import DataError
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.data import Split, TaskData
from fusionkit.tasks.regression import Regression


class TextData(TaskData):
    """Base of datamodules of texts from folders with `train.tsv.gz` and `test.tsv.gz`.

    Batches are mappings: what the tokenizer makes (`input_ids`, `attention_mask`, …), int64
    `(B, L)` padded to the longest of the batch, and `labels`, `(B,)`.

    Args:
        tasks: task name → folder.
        tokenizer: folder or hub name of a Hugging Face tokenizer, or `package:NAME/FOLDER`.
        batch_size: rows per batch.
        max_length: tokens to which texts are cut.
        val_fraction: share of the training rows kept for validation, in [0, 1).
        limit: at most so many rows per task and split; all by default.
        num_workers: loading processes per dataloader.
        seed: of the draws.
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
    ) -> None:
        super().__init__(tasks, batch_size, val_fraction, limit, num_workers, seed)
        self.max_length = max_length
        self._tokenizer_path = written_out(tokenizer)
        self._tokenizer: Any = None

    @abstractmethod
    def labelled(self, task: str, path: Path) -> tuple[list[Any], list[Sequence[str]]]:
        """A file's rows: their labels as numbers; and their texts, each one or a pair.

        Raises:
            DataError: a line can't be read so.
        """

    def read(self, task: str, split: Split) -> Dataset[dict[str, Any]]:
        """All rows, tokenized once."""
        labels, texts = self.labelled(task, self.paths[task] / f"{split}.tsv.gz")
        columns = [list(column) for column in zip(*texts, strict=True)]
        tokens = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
        return _Rows(
            [
                {**{key: tokens[key][place] for key in tokens}, "labels": label}
                for place, label in enumerate(labels)
            ]
        )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_path)
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
    """Labelled texts, `label<TAB>text` lines; see `TextData`.

    Args:
        tasks: task name → folder.
        tokenizer: folder or hub name of a Hugging Face tokenizer, or `package:NAME/FOLDER`.
        labels: task name → JSON file `{"labels": [...]}`, the class names in the order of the
            head's rows; by default the training rows' labels, sorted.
        batch_size: rows per batch.
        max_length: tokens to which texts are cut.
        val_fraction: share of the training rows kept for validation, in [0, 1).
        limit: at most so many rows per task and split; all by default.
        num_workers: loading processes per dataloader.
        seed: of the draws.

    Attributes:
        num_classes: task name → number of classes.

    Raises:
        DataError: a file is missing, a line has no tab, or a label is not known.
    """

    def __init__(
        self,
        tasks: dict[str, str],
        tokenizer: str,
        labels: dict[str, str] | None = None,
        batch_size: int = 64,
        max_length: int = 64,
        val_fraction: float = 0.1,
        limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            tasks, tokenizer, batch_size, max_length, val_fraction, limit, num_workers, seed
        )
        if unknown := sorted(set(labels or {}) - set(tasks)):
            raise DataError(f"`labels` names tasks that `tasks` lacks: {', '.join(unknown)}")
        self.labels = {task: self._labels(task, (labels or {}).get(task)) for task in self.tasks}
        self.num_classes = {task: len(names) for task, names in self.labels.items()}
        self.kinds = {task: Classification(count) for task, count in self.num_classes.items()}

    def labelled(self, task: str, path: Path) -> tuple[list[int], list[Sequence[str]]]:
        """Places among the task's classes, and texts."""
        rows = _read_rows(path)
        places = {name: place for place, name in enumerate(self.labels[task])}
        for number, (label, _) in enumerate(rows, start=1):
            if label not in places:
                known = ", ".join(list(places)[:8])
                raise DataError(
                    f"{path}, line {number}: label '{label}' is not among the {len(places)} of "
                    f"task '{task}' ({known}…); check `labels`"
                )
        return [places[label] for label, _ in rows], [(text,) for _, text in rows]

    def _labels(self, task: str, path: str | None) -> list[str]:
        if path is None:
            return sorted({label for label, _ in _read_rows(self.paths[task] / "train.tsv.gz")})
        try:
            names = json.loads(open_path(path).read_text(encoding="utf-8"))["labels"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError("'labels' is not a list of strings")  # noqa: TRY301
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: expected JSON with a list 'labels' (task '{task}'): {error}"
            ) from error
        return names


class TextRegression(TextData):
    """Texts or pairs of texts with a number each: `number<TAB>text[<TAB>text]`; see `TextData`.

    A file has pairs if its first line has two texts. Labels are float32.

    Args:
        tasks: task name → folder.
        tokenizer: folder or hub name of a Hugging Face tokenizer, or `package:NAME/FOLDER`.
        batch_size: rows per batch.
        max_length: tokens to which texts are cut.
        val_fraction: share of the training rows kept for validation, in [0, 1).
        limit: at most so many rows per task and split; all by default.
        num_workers: loading processes per dataloader.
        seed: of the draws.

    Raises:
        DataError: a file is missing, or a line is not a number and its texts.
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
    ) -> None:
        super().__init__(
            tasks, tokenizer, batch_size, max_length, val_fraction, limit, num_workers, seed
        )
        self.kinds = {task: Regression() for task in self.tasks}

    def labelled(self, task: str, path: Path) -> tuple[list[float], list[Sequence[str]]]:
        """Numbers, and texts or pairs."""
        numbers: list[float] = []
        texts: list[Sequence[str]] = []
        for line, (label, text) in enumerate(_read_rows(path), start=1):
            parts = text.split("\t")
            try:
                number = float(label)
            except ValueError:
                number = math.nan
            if not math.isfinite(number) or len(parts) != len(texts[0] if texts else parts[:2]):
                raise DataError(
                    f"{path}, line {line}: expected a number and as many texts as in the first "
                    f"line, one or two, with tabs between; got '{label}' and {len(parts)} texts"
                )
            numbers.append(number)
            texts.append(parts)
        return numbers, texts


class _Rows(Dataset[dict[str, Any]]):
    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


def _read_rows(path: Path) -> list[tuple[str, str]]:
    """`(label, text)` of every line; no quoting, so that any text but a line break can stand."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            lines = file.read().removesuffix("\n").split("\n")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; check the path") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a whole gzip file of UTF-8 text ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        label, tab, text = line.partition("\t")
        if not tab:
            raise DataError(f"{path}, line {number}: expected 'label<TAB>text', got no tab")
        rows.append((label, text))
    return rows
