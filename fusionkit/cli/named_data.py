"""The data that a command line names, each given to the model of its task."""

from collections.abc import Mapping, Sequence

from fusionkit.checkpoints.paths import open_path
from fusionkit.errors import DataError, in_line, meant
from fusionkit.tasks.data_of import LM_EVAL, tasks_of


def chosen(tasks: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    """The tasks that are asked for, or all.

    Raises:
        DataError: there is no such task.
    """
    for task in asked or ():
        if task not in tasks:
            raise DataError(f"no task '{task}'{meant(task, tasks)}; there is {in_line(tasks)}")
    return [task for task in tasks if task in asked] if asked else list(tasks)


def paired(tasks: Sequence[str], words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Each task's data.

    Data are told by their names: of files, of a folder's folders, or `TASK=PATH`. One task's, if
    they are given by a path alone, may be called as they like; of lm-eval, one is for all tasks.

    Args:
        tasks: names of the models.
        words: what `--data` is given.

    Returns:
        task → where its rows are; and the names of what a folder of tasks holds beside.

    Raises:
        DataError: a task has no data, data have no task, or there are none.
    """
    if not words:
        raise DataError(
            "no data are given; --data FOLDER, which has a folder or a file of rows for each task "
            f"({in_line(tasks)}), or --data TASK=PATH for each"
        )
    if len(words) == 1 and words[0].startswith(LM_EVAL):
        return dict.fromkeys(tasks, words[0]), []
    found = tasks_of(list(words))
    if len(tasks) == len(found) == len(words) == 1 and words[0] in found.values():
        return {tasks[0]: words[0]}, []
    beside = [name for name in found if name not in tasks]
    if lacking := [task for task in tasks if task not in found]:
        raise DataError(_lacks(lacking[0], tasks, {name: found[name] for name in beside}))
    named = [name for name in beside if _is_named(name, found[name], words)]
    if named:
        raise DataError(
            f"the data '{named[0]}' ({found[named[0]]}) are of no task{meant(named[0], tasks)}; "
            f"there is {in_line(tasks)}: leave them out, or call them as their task: "
            f"--data TASK={found[named[0]]}"
        )
    return {task: found[task] for task in tasks}, beside


def labels_of(tasks: Sequence[str], words: Sequence[str]) -> dict[str, str]:
    """What names each task's classes.

    Args:
        tasks: the tasks.
        words: `TASK=PATH`, or a path in which `*` stands for the task's name.

    Raises:
        DataError: it is neither, or of another task.
    """
    found: dict[str, str] = {}
    for word in words:
        task, equals, path = word.partition("=")
        if "*" in word:
            paths = {task: word.replace("*", task) for task in tasks}
            found |= {task: each for task, each in paths.items() if open_path(each).exists()}
        elif equals and task in tasks:
            found[task] = path
        elif len(tasks) == 1 and open_path(word).exists():
            found[tasks[0]] = word
        else:
            raise DataError(
                f"--labels {word}: expected TASK=PATH{meant(task, tasks) if equals else ''}, or a "
                f"path in which * stands for the task's name; the tasks are {in_line(tasks)}"
            )
    return found


def _lacks(task: str, tasks: Sequence[str], others: Mapping[str, str]) -> str:
    """That a task has no data, and what to do."""
    hint = meant(task, others)
    beside = f"; the others there are {in_line(list(others))}" if others and not hint else ""
    path = next((path for name, path in others.items() if f"'{name}'" in hint), "PATH")
    more = f", or score others alone: --task {tasks[-1]} …" if len(tasks) > 1 else ""
    return (
        f"there are no data of task '{task}'{hint or beside}: give them, --data {task}={path}{more}"
    )


def _is_named(name: str, path: str, words: Sequence[str]) -> bool:
    """Whether data were named themselves, and not found in a folder of tasks."""
    return path in words or f"{name}={path}" in words
