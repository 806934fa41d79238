"""Metrics by name: any of torchmetrics', with its arguments, for all tasks or for each its own."""

import inspect
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torchmetrics
from torch import Tensor
from torchmetrics import Metric

from fusionkit.errors import FusionKitError
from fusionkit.tasks.task import Task

MetricChoice = str | dict[str, Any] | Callable[[int], Metric] | None
"""What scores a task: a metric's name (`MatthewsCorrCoef`; with a dot, an import path), or
`{class_path: name, init_args: {…}}`; a task's name → one of these, where tasks differ; a function
that makes a metric from the number of classes; none: what the task's kind says."""

_PACKAGES = ("", ".classification", ".regression", ".text", ".retrieval", ".multimodal")


def check_choice(choice: MetricChoice, tasks: Collection[str]) -> None:
    """Check that a choice per task names tasks that there are.

    Raises:
        FusionKitError: it names another.
    """
    if isinstance(choice, dict) and "class_path" not in choice:
        for task in choice:
            if task not in tasks:
                raise FusionKitError(
                    f"metric: there is no task '{task}'; there is {', '.join(tasks)} (a metric "
                    "with arguments is {class_path: NAME, init_args: {…}})"
                )


def metric_of(choice: MetricChoice, task: str, kind: Task) -> Metric:
    """A fresh metric for a task.

    Args:
        choice: what was asked for.
        task: the task's name.
        kind: of what kind it is; fills in what arguments are left out (`num_classes`, …).

    Raises:
        FusionKitError: there is no such metric, or its arguments are not right.
    """
    if isinstance(choice, dict) and "class_path" not in choice:
        choice = choice.get(task)
    if choice is None:
        return kind.metric()
    given: dict[str, Any] = {}
    made: Any = choice
    if isinstance(choice, str | dict):
        settings: dict[str, Any] = choice if isinstance(choice, dict) else {"class_path": choice}
        given = {**(settings.get("init_args") or {}), **(settings.get("dict_kwargs") or {})}
        made = _named(settings["class_path"])
    try:
        if isinstance(made, type):
            known = _parameters(made)
            own = {key: value for key, value in kind.metric_arguments.items() if key in known}
            metric = made(**{**own, **given})
        else:
            metric = made(kind.head_size, **given)
    except Exception as error:  # of anyone's constructor
        raise FusionKitError(
            f"metric {getattr(made, '__name__', made)} of task '{task}' can't be made: {error}"
        ) from error
    if not isinstance(metric, Metric):
        raise FusionKitError(f"metric of task '{task}': {metric!r} is no torchmetrics.Metric")
    return metric


def update(metric: Metric, task: str, kind: Task, outputs: Tensor, batch: Any) -> None:
    """Let a task's metric take in the outputs of a batch.

    Raises:
        FusionKitError: it is for other outputs or labels than the task's.
    """
    try:
        kind.update(metric, outputs, batch)
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise FusionKitError(
            f"the metric of task '{task}', {type(metric).__name__}, is not for what the task has, "
            f"{kind!r}: {error}"
        ) from error


def value_of(metric: Metric, task: str) -> float:
    """What a metric has come to.

    Raises:
        FusionKitError: it is more than one number.
    """
    value = metric.compute()
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise FusionKitError(
            f"the metric of task '{task}', {type(metric).__name__}, gives more than one number; a "
            "score is one: set its `average`, say"
        )
    return float(value)


def is_lower_better(metric: Metric) -> bool:
    """Whether less is better: an error, say."""
    return metric.higher_is_better is False


def _named(path: Any) -> Any:
    place, _, leaf = str(path).rpartition(".")
    for package in [place] if place else [f"torchmetrics{each}" for each in _PACKAGES]:
        try:
            return getattr(import_module(package), leaf)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{package}.".startswith(f"{error.name}."):
                raise FusionKitError(f"metric '{path}' fails to import: {error}") from error
        except AttributeError:
            continue
    near = get_close_matches(leaf, torchmetrics.__all__, 3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise FusionKitError(
        f"there is no metric '{path}' in torchmetrics{hint or '; give its name, or an import path'}"
    )


def _parameters(metric: type) -> Mapping[str, inspect.Parameter]:
    """What a metric's constructor takes; torchmetrics' own by task choose a class in `__new__`."""
    maker: Any = metric.__new__ if "__new__" in vars(metric) else metric.__init__  # type: ignore[misc]
    return inspect.signature(maker).parameters
