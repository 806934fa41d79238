"""LightningDataModules of many tasks: one dataloader per task, in the order of `tasks`.

`ReuseModule` relies on `tasks` and `num_classes`, both known once the datamodule is constructed.
"""

import gzip
import json
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from fusionkit.checkpoints.paths import resolve_package_path
from fusionkit.errors import DataError

Split = Literal["train", "test"]


class TaskData(LightningDataModule, ABC):
    """Base of datamodules with several tasks; a subclass says how one split of one task is read.

    The validation rows are a seeded fraction of the training rows; the test rows are all of the
    test split.

    Args:
        tasks: task name → where its data are.
        batch_size: rows per batch.
        val_fraction: share of the training rows kept for validation, in [0, 1).
        limit: at most so many rows per task and split, drawn by the seed; all by default.
        num_workers: loading processes per dataloader.
        seed: of the draws.

    Attributes:
        tasks: the tasks' names, in the order of the dataloaders.
        num_classes: task name → number of classes.
    """

    num_classes: dict[str, int]

    def __init__(
        self,
        tasks: Mapping[str, str],
        batch_size: int,
        val_fraction: float,
        limit: int | None,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise DataError(f"expected val_fraction in [0, 1), got {val_fraction}")
        if limit is not None and limit < 1:
            raise DataError(f"expected limit to be at least 1 row, got {limit}")
        self.tasks = list(tasks)
        self.paths = {task: Path(path) for task, path in tasks.items()}
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.limit = limit
        self.num_workers = num_workers
        self.seed = seed
        self._splits: dict[tuple[str, Split], Dataset[Any]] = {}

    @abstractmethod
    def read(self, task: str, split: Split) -> Dataset[Any]:
        """All rows of one split of one task.

        Raises:
            DataError: they can't be read.
        """

    def collate(self, rows: list[Any]) -> Any:
        """Make a batch of rows."""
        return torch.utils.data.default_collate(rows)

    def order(self, dataset: Dataset[Any], rows: list[int]) -> list[int]:
        """The order in which rows are evaluated; scores don't depend on it."""
        return rows

    def train_dataloader(self) -> list[DataLoader[Any]]:
        """Training rows, shuffled: one dataloader per task."""
        return [self._loader(task, "train", validation=False, shuffle=True) for task in self.tasks]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Validation rows: one dataloader per task."""
        return [self._loader(task, "train", validation=True) for task in self.tasks]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Test rows: one dataloader per task."""
        return [self._loader(task, "test") for task in self.tasks]

    def calibration_dataloaders(self, rows: int, seed: int) -> dict[str, DataLoader[Any]]:
        """A few training rows of each task, in one fixed order, whatever `limit` is.

        Args:
            rows: rows per task; of a task with fewer, all.
            seed: draws them.
        """
        loaders = {}
        for task in self.tasks:
            training: Any = self._loader(task, "train", limited=False).dataset
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randperm(len(training), generator=generator)[:rows]
            chosen = [training.indices[place] for place in drawn.tolist()]
            loaders[task] = DataLoader(
                Subset(training.dataset, self.order(training.dataset, chosen)),
                batch_size=self.batch_size,
                collate_fn=self.collate,
                num_workers=self.num_workers,
            )
        return loaders

    def _loader(
        self,
        task: str,
        split: Split,
        validation: bool = False,
        shuffle: bool = False,
        limited: bool = True,
    ) -> DataLoader[Any]:
        if (task, split) not in self._splits:
            self._splits[task, split] = self.read(task, split)
        dataset: Any = self._splits[task, split]
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.arange(len(dataset))
        if split == "train":
            rows = torch.randperm(len(dataset), generator=generator)
            kept = round(self.val_fraction * len(dataset))
            rows = rows[:kept] if validation else rows[kept:]
        if limited and self.limit is not None and len(rows) > self.limit:
            rows = rows[torch.randperm(len(rows), generator=generator)[: self.limit]]
        chosen = rows.tolist() if shuffle else self.order(dataset, sorted(rows.tolist()))
        return DataLoader(
            Subset(dataset, chosen),
            batch_size=self.batch_size,
            shuffle=shuffle,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            generator=generator if shuffle else None,
        )


class ImageArrays(TaskData):
    """Images from NumPy archives with `x_train`, `y_train`, `x_test`, `y_test`, all uint8.

    Batches are `(x, y)`: float32 `(B, C, H, W)`, normalised, and int64 `(B,)`.

    Args:
        tasks: task name → `.npz` file; grey `(N, H, W)` or colour `(N, H, W, 3)`.
        batch_size: rows per batch.
        image_size: height and width to resize to (bilinear, antialiased); as they are by default.
        channels: 3 repeats grey images; 1 averages colour ones; as they are by default.
        mean: taken off the values, which are scaled to [0, 1] first.
        std: what they are then divided by.
        val_fraction: share of the training rows kept for validation, in [0, 1).
        limit: at most so many rows per task and split; all by default.
        num_workers: loading processes per dataloader.
        seed: of the draws.

    Raises:
        DataError: a file is missing or is not such an archive.
    """

    def __init__(
        self,
        tasks: dict[str, str],
        batch_size: int = 128,
        image_size: int | None = None,
        channels: Literal[1, 3] | None = None,
        mean: float = 0.5,
        std: float = 0.5,
        val_fraction: float = 0.1,
        limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(tasks, batch_size, val_fraction, limit, num_workers, seed)
        self.image_size = image_size
        self.channels = channels
        self.mean = mean
        self.std = std
        self.num_classes = {
            task: 1 + max(int(self._array(task, f"y_{split}").max()) for split in ("train", "test"))
            for task in self.tasks
        }

    def read(self, task: str, split: Split) -> TensorDataset:
        """The images stay uint8 in memory; a batch is normalised as it is made."""
        images = torch.from_numpy(self._array(task, f"x_{split}"))
        images = images[:, None] if images.ndim == 3 else images.movedim(-1, 1)
        labels = torch.from_numpy(self._array(task, f"y_{split}")).to(torch.int64)
        if len(images) != len(labels):
            raise DataError(
                f"{self.paths[task]}: 'x_{split}' has {len(images)} rows, 'y_{split}' {len(labels)}"
            )
        return TensorDataset(images, labels)

    def collate(self, rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Scale, fit channels and size, normalise."""
        images = torch.stack([image for image, _ in rows]).to(torch.float32) / 255
        if self.channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        elif self.channels == 1 and images.shape[1] == 3:
            images = images.mean(1, keepdim=True)
        if self.image_size is not None and images.shape[-2:] != (self.image_size,) * 2:
            images = torch.nn.functional.interpolate(
                images, (self.image_size, self.image_size), mode="bilinear", antialias=True
            )
        return (images - self.mean) / self.std, torch.stack([label for _, label in rows])

    def _array(self, task: str, name: str) -> np.ndarray[Any, Any]:
        path = self.paths[task]
        try:
            # Opened as a zip first: np.load takes other files too, and returns other types.
            with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as arrays:
                array: np.ndarray[Any, Any] = arrays[name]
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file (task '{task}'); check the path") from error
        except KeyError as error:
            raise DataError(f"{path}: has no array '{name}' (task '{task}')") from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path}: not a readable .npz archive ({error})") from error
        image = array.ndim == 3 or (array.ndim == 4 and array.shape[-1] == 3)
        fits = image if name.startswith("x_") else array.ndim == 1
        if array.dtype != np.uint8 or not fits or not len(array):
            expected = "(N, H, W) or (N, H, W, 3)" if name.startswith("x_") else "(N,)"
            raise DataError(
                f"{path}: '{name}' is {array.dtype} of shape {array.shape}; expected uint8 "
                f"{expected}, N at least 1"
            )
        return array


class TextClassification(TaskData):
    """Labelled texts from folders with `train.tsv.gz` and `test.tsv.gz`: `label<TAB>text` lines.

    Batches are mappings: what the tokenizer makes (`input_ids`, `attention_mask`, …), int64
    `(B, L)` padded to the longest of the batch, and `labels`, int64 `(B,)`.

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
        super().__init__(tasks, batch_size, val_fraction, limit, num_workers, seed)
        self.max_length = max_length
        self._tokenizer_path = resolve_package_path(tokenizer)
        self._tokenizer: Any = None
        if unknown := sorted(set(labels or {}) - set(tasks)):
            raise DataError(f"`labels` names tasks that `tasks` lacks: {', '.join(unknown)}")
        self.labels = {task: self._labels(task, (labels or {}).get(task)) for task in self.tasks}
        self.num_classes = {task: len(names) for task, names in self.labels.items()}

    def read(self, task: str, split: Split) -> Dataset[dict[str, Any]]:
        """All rows, tokenized once."""
        path = self.paths[task] / f"{split}.tsv.gz"
        rows = _read_rows(path)
        places = {name: place for place, name in enumerate(self.labels[task])}
        for number, (label, _) in enumerate(rows, start=1):
            if label not in places:
                known = ", ".join(list(places)[:8])
                raise DataError(
                    f"{path}, line {number}: label '{label}' is not among the {len(places)} of "
                    f"task '{task}' ({known}…); check `labels`"
                )
        tokens = self.tokenizer(
            [text for _, text in rows], truncation=True, max_length=self.max_length
        )
        return _Rows(
            [
                {**{key: tokens[key][place] for key in tokens}, "labels": places[label]}
                for place, (label, _) in enumerate(rows)
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

    def _labels(self, task: str, path: str | None) -> list[str]:
        if path is None:
            return sorted({label for label, _ in _read_rows(self.paths[task] / "train.tsv.gz")})
        try:
            names = json.loads(Path(path).read_text(encoding="utf-8"))["labels"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError("'labels' is not a list of strings")  # noqa: TRY301
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: expected JSON with a list 'labels' (task '{task}'): {error}"
            ) from error
        return names


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
