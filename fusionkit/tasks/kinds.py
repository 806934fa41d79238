"""Of what kind a datamodule's tasks are."""

from collections.abc import Mapping
from typing import Any

from fusionkit.errors import DataError
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.task import Task


def kinds_of(
    datamodule: Any,
    tasks: list[str],
    num_classes: Mapping[str, int] | None = None,
    scored: bool = True,
) -> dict[str, Task]:
    """Of what kind tasks are: as the datamodule declares, or classification.

    Args:
        datamodule: with `kinds`, or `num_classes`, or neither.
        tasks: which tasks.
        num_classes: number of classes by task, which goes before what the datamodule says.
        scored: whether metrics or heads are made for them; else a task of which nothing is known
            is classification, of a number of classes that nobody asks for.

    Raises:
        DataError: nothing is known of a task that is scored.
    """
    given = num_classes or {}
    declared: Mapping[str, Task] = getattr(datamodule, "kinds", None) or {}
    classes: Mapping[str, int] = getattr(datamodule, "num_classes", None) or {}
    kinds: dict[str, Task] = {}
    for task in tasks:
        if task in given:
            kinds[task] = Classification(given[task])
        elif task in declared:
            kinds[task] = declared[task]
        elif task in classes:
            kinds[task] = Classification(classes[task])
        elif not scored:
            kinds[task] = Classification(None)
        else:
            raise DataError(
                f"the number of classes of '{task}' is not known: give it in `num_classes`, or use "
                "a datamodule that has it, or says in `kinds` what else the task is"
            )
    return kinds
