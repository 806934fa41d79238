"""Labelled images: files in a folder for each class, paths in a table, Hugging Face data sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fusionkit.checkpoints.hub_names import Use, reads_hub
from fusionkit.errors import DataError
from fusionkit.tasks.class_names import Classes, Labels, checked_labels, class_names, classes_of
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.columns import image_column, label_column
from fusionkit.tasks.data import Split, Splits, TaskData, checked_splits
from fusionkit.tasks.table import MissingSplitError, Table
from fusionkit.tasks.table_files import NAMES, names_of_split, read_table
from fusionkit.tasks.transforms import ImageTransform, Preprocessing, image_transform

_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises of files that are no images, or damaged ones."""


@reads_hub(tasks=Use.ROWS, preprocessing=Use.PREPROCESSING)
class ImageClassification(TaskData):
    """Labelled images, made ready as their model wants them.

    Where a task's rows are, is: a folder of `train` and `test` folders, in each a folder of image
    files for each class (torchvision's `ImageFolder`); or a folder of class folders, whose images
    are test rows; or a table with a column of images or of their paths, which start at the table's
    folder: whatever `TextClassification` reads, a `.csv` file or a Hugging Face data set, say.

    Batches are `(x, y)`: float32 `(B, C, H, W)`, by the preprocessing with which the model is
    evaluated (training rows, too: nothing is drawn at random), and int64 `(B,)`. Grey and
    transparent images become RGB, or grey where the model takes one channel.

    Args:
        tasks: task name → where its rows are.
        preprocessing: whose preprocessing: a model's folder or name, of transformers or timm; or
            timm's data config, `{input_size: [3, 224, 224], mean: […], std: […]}`.
        labels: task name → its classes, in the order of the head's rows: names; or a JSON file
            `{"labels": [...]}`, or a fine-tuned model's folder whose `config.json` names them. By
            default what the data set calls its classes, or the names of the class folders, sorted.
        batch_size: rows per batch.
        val_fraction: share of the training rows kept for validation, in [0, 1).
        limit: at most so many rows per task and split; all by default.
        num_workers: loading processes per dataloader.
        seed: of the draws.
        image: column of a table's images; by default as it is commonly called.
        label: column of a table's labels; by default as it is commonly called.
        splits: `train` and `test` → what they are called; by default so, or `val` for `test`
            where there is no other.

    Attributes:
        labels: task name → its classes' names.
        num_classes: task name → number of classes.

    Raises:
        DataError: there are no images, a class is none of the head's, or the preprocessing is not
            known. An image that can't be read is named when it is needed.
    """

    def __init__(
        self,
        tasks: dict[str, str],
        preprocessing: Preprocessing,
        labels: dict[str, str | list[str]] | None = None,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        image: str | None = None,
        label: str | None = None,
        splits: Splits | None = None,
    ) -> None:
        super().__init__(tasks, batch_size, val_fraction, limit, num_workers, seed)
        self.image = image
        self.label = label
        self.splits = checked_splits(splits, tasks)
        self.transform = image_transform(preprocessing)
        heads = checked_labels(labels, tasks)
        self._classes = {task: self._classes_of(task, heads.get(task)) for task in self.tasks}
        self.labels = {task: classes.names for task, classes in self._classes.items()}
        self.num_classes = {task: len(names) for task, names in self.labels.items()}
        self.kinds = {task: Classification(count) for task, count in self.num_classes.items()}

    def read(self, task: str, split: Split) -> Dataset[tuple[Tensor, int]]:
        """All rows: images are opened as they are needed."""
        classes, found = self._classes[task], self._found(task, split)
        if isinstance(found, Path):
            return _Files(_files_of(found, classes), self.transform)
        labels = found.labels(label_column(found, self.label))
        places = [classes.place(label, found.at(row)) for row, label in enumerate(labels)]
        column = image_column(found, self.image)
        if not isinstance(_value(found, column, 0), str):
            return _Decoded(found, column, places, self.transform)
        paths = [_path(found, row, path) for row, path in enumerate(found.column(column))]
        return _Files(list(zip(paths, places, strict=True)), self.transform)

    def _found(self, task: str, split: Split) -> Path | Table:
        """A split's folder of class folders, or its table.

        Raises:
            DataError: there is neither.
        """
        path = self.paths[task]
        found = class_folders(path, split, self.called(task)) if path.is_dir() else None
        return found or read_table(path, split, self.called(task))

    def _classes_of(self, task: str, head: Labels | None) -> Classes:
        try:
            found = self._found(task, "train")
        except MissingSplitError:
            found = self._found(task, "test")
        if isinstance(found, Path):
            names = _class_names_in(found)
            _refuse_ambiguous(found, names, head)
            return classes_of(task, names, lambda row: str(found / names[row]), head)
        image_column(found, self.image)  # now, not when they are opened
        name = label_column(found, self.label)
        named = (found.classes or {}).get(name)
        return classes_of(task, found.labels(name), found.at, head, named)


def class_folders(path: Path, split: Split, called: Mapping[str, str] | None = None) -> Path | None:
    """The folder of a split's class folders; None where there are none.

    Args:
        path: a task's folder.
        split: which.
        called: `train` and `test` → what they are called.

    Raises:
        MissingSplitError: the other split's are there alone.
    """
    names = names_of_split(split, called)
    for name in names:
        if has_classes(path / name):
            return path / name
    known = {*(called or {}).values(), *(name for each in NAMES.values() for name in each)}
    others = sorted(
        each.name for each in path.iterdir() if each.name in known and has_classes(each)
    )
    if not others and not has_classes(path):
        return None
    if others or split == "train":
        there = f"it has {', '.join(others)}" if others else "its class folders hold test rows"
        raise MissingSplitError(
            f"{path}: has no {split} images: expected a folder {' or '.join(names)}, in it a "
            f"folder for each class; {there}. `splits` says how else they are called"
        )
    return path


def has_classes(path: Path) -> bool:
    """Whether a folder is one of class folders: one in it holds an image."""
    return path.is_dir() and any(map(_holds_image, filter(is_class, path.iterdir())))


def is_class(path: Path) -> bool:
    """Whether it is a folder that is not hidden, as those of notebooks and file managers are."""
    return path.is_dir() and not path.name.startswith(".")


def _holds_image(folder: Path) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return any(each.name.lower().endswith(IMG_EXTENSIONS) for each in folder.iterdir())


def _class_names_in(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if is_class(each))


def _files_of(folder: Path, classes: Classes) -> list[tuple[str, int]]:
    """The images of a folder of class folders, and their classes.

    Raises:
        DataError: a folder is none of the classes, or has no image.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    places = {name: classes.place(name, str(folder / name)) for name in _class_names_in(folder)}
    try:
        rows: list[tuple[str, int]] = make_dataset(str(folder), places, IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: a class folder without images: {error}; add some, or remove the folder"
        ) from error
    return rows


def _refuse_ambiguous(folder: Path, names: Sequence[str], head: Labels | None) -> None:
    """Refuse class folders called by numbers that are other classes sorted as text.

    Raises:
        DataError: they are, and no one has said what the head's rows are called.
    """
    numbers = [str(number) for number in range(len(names))]
    unnamed = head is None or (isinstance(head, str) and class_names(head, "") == numbers)
    if all(name.isdecimal() for name in names) and list(names) != numbers and unnamed:
        raise DataError(
            f"{folder}: its class folders are numbers, {', '.join(names[:4])}…, and which row of "
            "the head is which can't be told: by number, or sorted as text (torchvision); give "
            "`labels`, their names in the order of the head's rows"
        )


class _Files(Dataset[tuple[Tensor, int]]):
    """Image files, opened as they are needed."""

    def __init__(self, rows: list[tuple[str, int]], transform: ImageTransform) -> None:
        self._rows = rows
        self._transform = transform

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, place = self._rows[index]
        return self._transform(opened(path, path, self._transform.mode)), place


class _Decoded(Dataset[tuple[Tensor, int]]):
    """Images of a data set, which opens them itself."""

    def __init__(
        self, table: Table, column: str, places: list[int], transform: ImageTransform
    ) -> None:
        self._table, self._column, self._places = table, column, places
        self._transform = transform

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = image_in(self._table, self._column, index, self._transform.mode)
        return self._transform(image), self._places[index]


def image_in(table: Table, column: str, row: int, mode: Literal["RGB", "L"]) -> Image.Image:
    """The image of a table's row, or the one that its path leads to.

    Raises:
        DataError: nothing is there, or it is no image.
    """
    value = _value(table, column, row)
    if isinstance(value, str):
        path = _path(table, row, value)
        return opened(path, path, mode)
    return opened(value, table.at(row), mode)


def opened(image: Any, at: str, mode: Literal["RGB", "L"]) -> Image.Image:
    """An image, whole, in a mode.

    Args:
        image: a path, or a PIL image.
        at: how messages call it.
        mode: see `ImageTransform`.

    Raises:
        DataError: it can't be read, or has more than 8 bits a channel, which PIL would cut off.
    """
    if not isinstance(image, str | Path | Image.Image):
        raise DataError(
            f"{at}: expected an image or a path to one, got {type(image).__name__}; `image` "
            "chooses another column"
        )
    try:
        found = image if isinstance(image, Image.Image) else Image.open(image)
        if found.mode.startswith(("I", "F")):
            raise DataError(
                f"{at}: has more than 8 bits a channel (mode {found.mode}); save it with 8"
            )
        return found.convert(mode)
    except _UNREADABLE as error:
        raise DataError(
            f"{at}: not a readable image ({error}); mend it, or take it out of the data"
        ) from error


def _value(table: Table, column: str, row: int) -> Any:
    try:
        return table.rows[row][column]
    except _UNREADABLE as error:  # a data set opens its images itself
        raise DataError(
            f"{table.at(row)}: column '{column}' is not a readable image ({error}); mend it, or "
            "take the row out"
        ) from error


def _path(table: Table, row: int, path: Any) -> str:
    """Where a table's row says that its image is.

    Raises:
        DataError: nothing is there.
    """
    found = (table.folder or Path()) / str(path)
    if not found.is_file():
        raise DataError(
            f"{table.at(row)}: no such image, {found}; paths start at the table's own folder"
        )
    return str(found)
