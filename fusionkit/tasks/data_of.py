"""A datamodule from one line: what lies there says of what kind it is."""

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from fusionkit.checkpoints.paths import open_path
from fusionkit.errors import DataError, meant
from fusionkit.tasks.class_names import head_folder
from fusionkit.tasks.columns import has_images, label_column
from fusionkit.tasks.data import Split, TaskData, splits_of
from fusionkit.tasks.image_files import class_folders, has_classes
from fusionkit.tasks.language_rows import PLAIN_FILES, is_language, plain_file
from fusionkit.tasks.models import LANGUAGE_MODELS, config_of
from fusionkit.tasks.table import MissingSplitError, Table
from fusionkit.tasks.table_files import (
    BINARY_FILES,
    NAMES,
    SAVED,
    TEXT_FILES,
    file_in,
    read_table,
    text_of,
)
from fusionkit.tasks.transforms import preprocessing_of

_SPLITS: tuple[Split, Split] = ("test", "train")
"""Either is looked at for what a task is."""
Model = str | Path | nn.Module | None
"""A base model: its folder, its name on a hub, or itself."""
LM_EVAL = "lm_eval:"
"""What a path begins with that is a task of lm-eval, by name or YAML file; or several, `a,b`."""
Spec = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
"""Where tasks' rows are: a folder of tasks, `task=path`, several of either, or task → path."""


def data_of(
    spec: Spec,
    *,
    model: Model = None,
    heads: Mapping[str, Any] | None = None,
    labels: Mapping[str, str | Sequence[str]] | None = None,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    image: str | None = None,
    splits: Mapping[str, Any] | None = None,
    **settings: Any,
) -> TaskData:
    """The datamodule of some tasks' rows, its kind found from what lies there.

    Args:
        spec: a folder that holds a task in each of its folders and files, called as they are; or
            one task, as `task=path`, or a path that names it; or several of these in a list; or
            task → path. A path is one of those of `TextClassification`, `ImageClassification`,
            `ImageArrays` or `LanguageData`: local, or the name of a Hugging Face data set
            (`ORG/NAME:CONFIG`); or `lm_eval:NAME`, a task of lm-eval's, by name or YAML file.
        model: the base model: its tokenizer, or how it wants its images, are taken from its folder
            or its name on a hub; of images also from a live model of timm.
        heads: task → fine-tuned model. Where its folder's `config.json` names its classes, labels
            are checked against them, and numbered as its head has them.
        labels: task → its classes, in the order of its head's rows: names, or a file or folder
            that names them. Goes before `heads`.
        text: column of the texts, or columns of the first and the second; found by itself.
        label: column of the labels; found by itself.
        image: column of the images, or of their paths; found by itself.
        splits: `train` and `test` → how the data call them; task → the same, of that task alone.
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
    made: TaskData = _class(recipe["class_path"])(**recipe["init_args"])
    return made


def data_recipe(
    spec: Spec,
    *,
    model: Model = None,
    heads: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What `data_of` makes, as a recipe's section `data`: JSON's types alone.

    Args:
        spec: see `data_of`, as for what follows.
        model: see there.
        heads: see there; or, in place of a model, the list of its classes' names.
        settings: see there; None is as if it were not given.

    Returns:
        `class_path` and `init_args`.

    Raises:
        DataError: as of `data_of`.
    """
    tasks = tasks_of(spec)
    given = {key: _plain(value) for key, value in settings.items() if value is not None}

    def kind_of(task: str, path: str) -> str:
        if path.startswith(LM_EVAL):
            return _HARNESS
        own = {**given, "splits": splits_of(given.get("splits"), task)}
        return _kind(open_path(path), own, model)

    kinds = {task: kind_of(task, path) for task, path in tasks.items()}
    kind = next(iter(kinds.values()))
    if other := next((task for task, each in kinds.items() if each != kind), None):
        first = next(iter(kinds))
        raise DataError(
            f"'{first}' ({tasks[first]}) is {_SAID[kind]}, '{other}' ({tasks[other]}) is "
            f"{_SAID[kinds[other]]}: one model has tasks of one kind; give the tasks of either"
        )
    arguments: dict[str, Any] = {"tasks": tasks}
    if kind in _WHAT:
        setting, reason = _WHAT[kind]
        arguments[setting] = given.pop(setting, None) or _from_model(kind, model, tasks, reason)
    if kind == _HARNESS:
        named = {task: path.removeprefix(LM_EVAL) for task, path in tasks.items()}
        arguments["tasks"] = {t: n.split(",") if "," in n else n for t, n in named.items()}
    if kind in (_TEXTS, _IMAGES):
        labels = {
            task: head if isinstance(head, list) else str(head_folder(head) or "")
            for task, head in (heads or {}).items()
        }
        labels = {task: names for task, names in labels.items() if names}
        labels.update(given.pop("labels", {}))
        given["labels"] = {task: labels[task] for task in tasks if task in labels}
    if kind == _LANGUAGE and _writes(model) == "encoder-decoder":
        given.setdefault("encoder_decoder", True)
    arguments |= {key: value for key, value in given.items() if value != {}}
    _check_settings(_class(kind), arguments)
    return {"class_path": kind, "init_args": arguments}


def tasks_of(spec: Spec) -> dict[str, str]:
    """The tasks that a description names: name → where its rows are; no row is read.

    Raises:
        DataError: there are none, or two of one name.
    """
    if isinstance(spec, Mapping):
        return {task: str(path) for task, path in spec.items()}
    found: dict[str, str] = {}
    for each in [spec] if isinstance(spec, str | Path) else spec:
        for task, path in _tasks_of_one(str(each)).items():
            if task in found:
                raise DataError(
                    f"two tasks are called '{task}', {found[task]} and {path}; name them: NAME=PATH"
                )
            found[task] = path
    if not found:
        raise DataError("no data are given; give a folder of tasks, or NAME=PATH for each")
    return found


_TEXTS = "fusionkit.tasks.texts.TextClassification"
_NUMBERS = "fusionkit.tasks.texts.TextRegression"
_IMAGES = "fusionkit.tasks.image_files.ImageClassification"
_ARRAYS = "fusionkit.tasks.images.ImageArrays"
_LANGUAGE = "fusionkit.tasks.language_data.LanguageData"
_HARNESS = "fusionkit.tasks.lm_eval.LMEval"
_SAID = {
    _TEXTS: "labelled texts",
    _NUMBERS: "texts with numbers",
    _IMAGES: "images",
    _ARRAYS: "arrays of images",
    _LANGUAGE: "rows for a language model",
    _HARNESS: "one of lm-eval's",
}
"""What the messages call the kinds, which are datamodules' class paths."""
_WHAT = {
    _TEXTS: ("tokenizer", "texts need the model's tokenizer"),
    _NUMBERS: ("tokenizer", "texts need the model's tokenizer"),
    _IMAGES: ("preprocessing", "images need what their model makes of them"),
    _LANGUAGE: ("tokenizer", "texts need the model's tokenizer"),
    _HARNESS: ("tokenizer", "lm-eval's tasks need the model's tokenizer"),
}
"""Kind → the setting that is the base model's, and why it is needed."""


def _kind(path: Path, given: Mapping[str, Any], model: Model) -> str:
    """Of what kind a task is, for some model: its datamodule's class path."""
    if path.suffix == ".npz":
        return _ARRAYS
    splits = given.get("splits")
    if "label" not in given and _is_plain(path, splits, model):
        return _LANGUAGE
    table: Table | None = None
    for split in _SPLITS:
        try:
            if path.is_dir() and class_folders(path, split, splits):
                return _IMAGES
            table = read_table(path, split, splits)
            break
        except MissingSplitError:
            if split == _SPLITS[-1]:
                raise
    assert table is not None
    if "image" in given or ("text" not in given and has_images(table)):
        return _IMAGES
    if "columns" in given or ("label" not in given and is_language(table.columns)):
        return _LANGUAGE
    label = label_column(table, given.get("label"))
    return _NUMBERS if _are_numbers(table, label) else _TEXTS


def _is_plain(path: Path, splits: Mapping[str, str] | None, model: Model) -> bool:
    """Whether a task is a text; the lines of a `.txt` may be labels and texts, too."""
    for split in _SPLITS:
        try:
            file = plain_file(path, split, splits)
        except MissingSplitError:
            continue
        if file is not None:
            labelled = file.suffix != ".gz" and "\t" in text_of(file).partition("\n")[0]
            return not labelled or bool(_writes(model))
    return False


def _writes(model: Model) -> str:
    """Whether a model is a language model, `causal` or `encoder-decoder`; else nothing."""
    config = getattr(model, "config", None) if isinstance(model, nn.Module) else config_of(model)
    known = getattr(config, "architectures", None) or []
    if not any(str(name).endswith(LANGUAGE_MODELS) for name in known):
        return ""
    return "encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "causal"


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _check_settings(datamodule: Any, arguments: Mapping[str, Any]) -> None:
    """Check that a datamodule has settings of these names.

    Raises:
        DataError: it has not.
    """
    known = list(inspect.signature(datamodule).parameters)
    if unknown := [name for name in arguments if name not in known]:
        hint = meant(unknown[0], known)
        raise DataError(
            f"{datamodule.__name__} has no setting '{unknown[0]}'{hint or ';'} it has "
            f"{', '.join(known[1:])}"
        )


def _are_numbers(table: Table, label: str) -> bool:
    """Whether labels are numbers that name no class: some have a fraction."""
    fractions = False
    for value in table.labels(label):
        try:
            fractions |= not float(value).is_integer()
        except (TypeError, ValueError, OverflowError):
            return False
    return fractions


def _from_model(kind: str, model: Model, tasks: Mapping[str, str], reason: str) -> Any:
    """What a datamodule needs of the base model.

    Raises:
        DataError: there is no model, or none that says it.
    """
    if isinstance(model, nn.Module) and kind == _IMAGES:
        return preprocessing_of(model)
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    if model is None or (isinstance(model, nn.Module) and not name):
        setting = _WHAT[kind][0]
        raise DataError(
            f"{next(iter(tasks.values()))}: {reason}; give `model`, its folder or name, or "
            f"`{setting}`"
        )
    return str(name or model)


def _tasks_of_one(text: str) -> dict[str, str]:
    """The tasks that one item of a description names."""
    task, equals, path = text.partition("=")
    if equals and "/" not in task and not open_path(text).exists():
        if not task or not path:
            raise DataError(f"{text}: expected NAME=PATH, the task's name and where its rows are")
        return {task: path}
    folder = open_path(text)
    if not folder.is_dir() or _is_task(folder):
        return {_name(folder): text}
    found = {_name(path): str(path) for path in sorted(folder.iterdir()) if _may_be_task(path)}
    if not found:
        raise DataError(
            f"{text}: holds neither tasks nor a task's rows: expected a folder or a file of rows "
            "for each task (.csv, .jsonl, .parquet, .npz, …), or folders train and test"
        )
    return found


def _is_task(folder: Path) -> bool:
    """Whether a folder has rows of its own, and not tasks."""
    names = [name for each in NAMES.values() for name in each]
    return (
        file_in(folder, names) is not None
        or any((folder / f"{name}{ending}").is_file() for name in names for ending in PLAIN_FILES)
        or has_classes(folder)
        or any((folder / name).is_dir() for name in names)
        or any(path.name in SAVED for path in folder.iterdir())
        or any(path.name.startswith((*names, "data")) for path in folder.glob("*.parquet"))
        or any((folder / "data").glob("*.parquet"))
    )


def _may_be_task(path: Path) -> bool:
    known = (*TEXT_FILES, *PLAIN_FILES, *BINARY_FILES, ".npz")
    return not path.name.startswith(".") and (path.is_dir() or path.name.endswith(known))


def _name(path: Path) -> str:
    """What a path's task is called: its last name, without ending or configuration."""
    name = path.name.partition(":")[0]
    known = (*TEXT_FILES, *PLAIN_FILES, *BINARY_FILES, ".npz")
    ending = next((ending for ending in known if name.endswith(ending)), "")
    return name.removesuffix(ending)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return list(value) if isinstance(value, tuple) else value
