"""A datamodule from one line: what lies there says of what kind it is."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from fusionkit.checkpoints.paths import open_path
from fusionkit.errors import DataError
from fusionkit.tasks.data import TaskData

Spec = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
"""Where tasks' rows are: a folder of tasks, `task=path`, several of either, or task → path."""


def data_of(
    spec: Spec,
    *,
    model: str | Path | nn.Module | None = None,
    heads: Mapping[str, Any] | None = None,
    labels: Mapping[str, str | Sequence[str]] | None = None,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    image: str | None = None,
    splits: Mapping[str, str] | None = None,
    **settings: Any,
) -> TaskData:
    """The datamodule of some tasks' rows, its kind found from what lies there.

    Args:
        spec: a folder that holds a task in each of its folders and files, called as they are; or
            one task, as `task=path`, or a path that names it; or several of these in a list; or
            task → path. A path is one of those of `TextClassification`, `ImageClassification` or
            `ImageArrays`: local, or the name of a Hugging Face data set (`ORG/NAME:CONFIG`).
        model: the base model: its tokenizer, or how it wants its images, are taken from its folder
            or its name on a hub; of images also from a live model of timm.
        heads: task → fine-tuned model. Where its folder's `config.json` names its classes, labels
            are checked against them, and numbered as its head has them.
        labels: task → its classes, in the order of its head's rows: names, or a file or folder
            that names them. Goes before `heads`.
        text: column of the texts, or columns of the first and the second; found by itself.
        label: column of the labels; found by itself.
        image: column of the images, or of their paths; found by itself.
        splits: `train` and `test` → how the data call them.
        settings: of the datamodule: `batch_size`, `limit`, `seed`, …

    Raises:
        DataError: it can't be told what lies there, tasks are of different kinds, or `model` is
            needed.
    """
    recipe = data_recipe(
        spec,
        model=model,
        heads=heads,
        labels=labels,
        text=text,
        label=label,
        image=image,
        splits=splits,
        **settings,
    )
    module, _, name = recipe["class_path"].rpartition(".")
    made: TaskData = getattr(import_module(module), name)(**recipe["init_args"])
    return made


def data_recipe(
    spec: Spec, *, model: str | Path | nn.Module | None = None, **settings: Any
) -> dict[str, Any]:
    """What `data_of` makes, as a recipe's section `data`: JSON's types alone.

    Args:
        spec: see `data_of`, as for what follows.
        model: see there.
        settings: see there.

    Returns:
        `class_path` and `init_args`.

    Raises:
        DataError: as of `data_of`.
    """
    tasks = tasks_of(spec)
    given = {key: value for key, value in settings.items() if value is not None}
    given.pop("heads", None)
    if all(path.endswith(".npz") for path in tasks.values()):
        return {
            "class_path": "fusionkit.tasks.images.ImageArrays",
            "init_args": {"tasks": tasks, **given},
        }
    if model is None:
        raise DataError(f"{next(iter(tasks.values()))}: texts need a tokenizer; give `model`")
    return {
        "class_path": "fusionkit.tasks.texts.TextClassification",
        "init_args": {"tasks": tasks, "tokenizer": str(model), **given},
    }


def tasks_of(spec: Spec) -> dict[str, str]:
    """The tasks that a description names: name → where its rows are; nothing of them is read.

    Raises:
        DataError: there are none, or two of one name.
    """
    if isinstance(spec, Mapping):
        return {task: str(path) for task, path in spec.items()}
    found: dict[str, str] = {}
    for each in [spec] if isinstance(spec, str | Path) else spec:
        for task, path in _tasks_of_one(str(each)).items():
            if task in found:
                raise DataError(f"two tasks are called '{task}': {found[task]} and {path}")
            found[task] = path
    if not found:
        raise DataError("there are no tasks in what was given as data")
    return found


def _tasks_of_one(text: str) -> dict[str, str]:
    task, equals, path = text.partition("=")
    if equals and "/" not in task:
        return {task: path}
    folder = open_path(text)
    return {path.name.partition(".")[0]: str(path) for path in sorted(folder.iterdir())}
