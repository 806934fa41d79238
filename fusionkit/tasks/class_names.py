"""Which class a label means: the head's rows in their order, against what the data say."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusionkit.checkpoints.json_text import parsed_json, read_json
from fusionkit.checkpoints.model_folder import is_weights
from fusionkit.checkpoints.paths import is_remote, open_path
from fusionkit.errors import DataError, meant

Labels = str | Sequence[str]
"""A task's classes: names in the order of its head's rows, or a file or folder that has them."""

_TRUTH = ("False", "True")
_BETWEEN = re.compile(r"(?<=[^\s_/-])[\s_/-]+(?=[^\s_/-])")
"""What stands between words, in different spellings of a name."""


class Classes:
    """A task's classes, in the order of its head's rows.

    Labels that are whole numbers, where the classes have other names, are the classes' numbers;
    false and true are the first and the second of two. Names may be spelled otherwise as far as
    case and what stands between words go: `baseball_diamond` is "baseball diamond".

    Args:
        task: the task's name.
        names: the classes' names, each once.
        others: what each is called elsewhere, as by the prompts of a zero-shot head.

    Raises:
        DataError: a name is there twice.
    """

    def __init__(self, task: str, names: Sequence[str], others: Sequence[str] = ()) -> None:
        self.task = task
        self.names = list(names)
        self._places = {name: place for place, name in enumerate(self.names)}
        self._spelled: dict[str, int | None] = {}  # None: of several
        for called in (self.names, others):
            for place, name in enumerate(called):
                if self._spelled.setdefault(_spelled(name), place) != place:
                    self._spelled[_spelled(name)] = None
        if len(self._places) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise DataError(f"task '{task}': class '{twice}' is named twice; check `labels`")

    def __len__(self) -> int:
        return len(self.names)

    def place(self, label: Any, at: str) -> int:
        """A label's class, from 0.

        Args:
            label: a name or a number.
            at: how messages call the row that has it.

        Raises:
            DataError: there is no such class.
        """
        name = label_text(label)
        if name in self._places:
            return self._places[name]
        if name.isdecimal() and int(name) < len(self.names):
            return int(name)
        if (place := self._spelled.get(_spelled(name))) is not None:
            return place
        if name in _TRUTH and len(self.names) == len(_TRUTH):
            return _TRUTH.index(name)
        hint = meant(name, self.names)
        raise DataError(
            f"{at}: label '{name}' is not among the {len(self.names)} of task '{self.task}' "
            f"({_shown(self.names)}){hint or ';'} check `labels`, their names in the order of the "
            "head's rows"
        )


def classes_of(
    task: str,
    labels: Sequence[Any],
    at: Callable[[int], str],
    head: Labels | None = None,
    named: Sequence[str] | None = None,
    numbers: bool = True,
) -> Classes:
    """A task's classes, and a check of all of its labels.

    Args:
        task: the task's name.
        labels: of its rows: names or numbers.
        at: how messages call a row.
        head: what is known of the head's classes; goes before what the data say.
        named: what the data set calls its classes, in its order.
        numbers: whether labels that are all whole numbers are numbers of classes, from 0; else
            they are names like others, which are sorted.

    Raises:
        DataError: the head's classes can't be read, or a row's is none of them.
    """
    rows = {label_text(label): row for row, label in reversed(list(enumerate(labels)))}
    counted = numbers and all(label.isdecimal() for label in rows)
    if named:
        names = list(named)
    elif counted:
        names = [str(number) for number in range(1 + max(map(int, rows)))]
    else:
        names = sorted(rows)
    if head is None:
        return Classes(task, names)
    of_head = class_names(head, task)
    if of_head == [str(number) for number in range(len(of_head))] and not counted:
        if len(names) != len(of_head):
            raise DataError(
                f"{at(0)}, and others: the data of task '{task}' have {len(names)} classes "
                f"({_shown(names)}), its head {len(of_head)}, which it does not name; give "
                "`labels`, their names in the order of the head's rows"
            )
        return Classes(task, names)
    classes = Classes(task, of_head, _called_otherwise(head))
    for label, row in rows.items():
        classes.place(label, at(row))
    return classes


def _spelled(name: str) -> str:
    return _BETWEEN.sub(" ", name).casefold()


def _called_otherwise(head: Labels) -> list[str]:
    """What a file of classes for a zero-shot head has its prompts call them, if that is else."""
    if not isinstance(head, str):
        return []
    names = read_json(_file(open_path(head))).get("names")
    return [str(name) for name in names] if isinstance(names, list) else []


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + ("…" if len(names) > 8 else "")


def label_text(label: Any) -> str:
    """A label as text: 2, 2.0 and '2' are one."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label)


def class_names(labels: Labels, task: str) -> list[str]:
    """The class names that a setting gives.

    Args:
        labels: names; or a JSON file with a list `labels`, or a model's folder or `config.json`.
        task: whose they are.

    Raises:
        DataError: nothing there names classes.
    """
    if not isinstance(labels, str):
        return [str(name) for name in labels]
    path = open_path(labels)
    try:
        content = read_json(_file(path))
        names = _named_in(content)
        if names is None:
            raise TypeError("there is no such list of strings")  # noqa: TRY301
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{path}: expected JSON with a list 'labels', or a model's config.json that names its "
            f"classes (task '{task}'): {error}"
        ) from error
    return names


def checked_labels(labels: Mapping[str, Labels] | None, tasks: Iterable[str]) -> dict[str, Labels]:
    """The setting `labels`, of tasks that there are.

    Raises:
        DataError: it names another.
    """
    if unknown := sorted(set(labels or {}) - set(tasks)):
        raise DataError(f"`labels` names tasks that `tasks` lacks: {', '.join(unknown)}")
    return dict(labels or {})


def head_folder(model: Any) -> Path | None:
    """The folder of a fine-tuned model, where its `config.json` says which classes there are.

    Args:
        model: the folder, or its file of weights; of anything else nothing is known.
    """
    if not isinstance(model, str | Path) or is_remote(model):
        return None
    path = open_path(model)
    folder = path.parent if is_weights(path) else path
    try:
        content = read_json(_file(folder)) if folder.is_dir() else {}
    except (OSError, ValueError):
        return None
    return folder if isinstance(content, dict) and _named_in(content) else None


def named_classes(config: bytes | Path | None) -> list[str] | None:
    """The classes that a model's `config.json` names, in the order of its head's rows.

    Args:
        config: its content, or the file.

    Returns:
        their names; numbers, where it says how many there are alone; None where it says neither.
    """
    try:
        content = read_json(config) if isinstance(config, Path) else parsed_json(config or b"{}")
        return _named_in(content) if isinstance(content, dict) else None
    except (OSError, ValueError):
        return None


def _file(path: Path) -> Path:
    """What names the classes of a folder's model, or the file itself."""
    labels = path / "labels.json"
    return (labels if labels.is_file() else path / "config.json") if path.is_dir() else path


def _named_in(content: Mapping[str, Any]) -> list[str] | None:
    """Class names in a `labels.json`, or in the configuration of transformers or timm."""
    by_number = content.get("id2label")
    by_number = by_number if isinstance(by_number, dict) else {}
    names: Any = [str(by_number[number]) for number in sorted(by_number, key=int)]
    names = names or content.get("labels") or content.get("label_names")
    count = len(by_number) or content.get("num_classes")
    if isinstance(count, int) and names in (None, [f"LABEL_{place}" for place in range(count)]):
        names = [str(place) for place in range(count)]  # that many, without names
    known = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return names if known else None
