"""Metrics by name: any of torchmetrics', with its arguments, for all tasks or for each its own."""

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from typing import Any, cast

import torchmetrics
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from fusionkit.errors import FusionKitError
from fusionkit.tasks.facts import Facts
from fusionkit.tasks.glue import glue_task, is_glue
from fusionkit.tasks.metric_facts import facts_of
from fusionkit.tasks.task import Task

MetricChoice = str | dict[str, Any] | Callable[[int], Metric] | None
"""What scores a task: a metric's name (`MatthewsCorrCoef`; with a dot, an import path), or
`{class_path: name, init_args: {…}}`; several, `{metrics: [name, …], counts: name}`, of which one
counts; a task's name → one of these, where tasks differ; a function that makes a metric (or a
MetricCollection) from the number of classes; `glue`, what GLUE scores its task of that name by, or
`glue:NAME`; none: what the task's kind says. A metric that does not say itself which way is better
is told `higher_is_better` beside its `class_path`."""

Metrics = dict[str, Metric]
"""A name → a metric; the first one counts."""

_PACKAGES = ("", ".classification", ".regression", ".text", ".retrieval", ".multimodal")
_KEYS = {"class_path", "metrics", "counts", "higher_is_better"}
"""What tells settings of a metric from a choice per task."""


def check_choice(choice: MetricChoice, tasks: Collection[str]) -> None:
    """Check that a choice per task names tasks that there are.

    Raises:
        FusionKitError: it names another.
    """
    if isinstance(choice, dict) and not _KEYS & choice.keys():
        for task in choice:
            if task not in tasks:
                raise FusionKitError(
                    f"metric: there is no task '{task}'; there is {', '.join(tasks)} (a metric "
                    "with arguments is {class_path: NAME, init_args: {…}})"
                )


def metrics_of(choice: MetricChoice, task: str, kind: Task) -> tuple[Metrics, Facts]:
    """A task's fresh metrics, and what is known of the one that counts, which is the first.

    Args:
        choice: what was asked for.
        task: the task's name.
        kind: of what kind it is; fills in what arguments are left out (`num_classes`, …).

    Raises:
        FusionKitError: there is no such metric, its arguments are not right, it is not said which
            of several counts, or one is not for what the task has.
    """
    if isinstance(choice, dict) and not _KEYS & choice.keys():
        choice = choice.get(task)
    if isinstance(choice, str) and is_glue(choice):
        choice = cast(MetricChoice, glue_task(choice, task).metric)
    settings = choice if isinstance(choice, dict) else {}
    found = _several(choice, task, kind)
    counts = settings.get("counts")
    if counts is None and len(found) > 1 and choice is not None:
        raise FusionKitError(
            f"task '{task}' has several metrics, {', '.join(found)}, and it is not said which one "
            f"counts: metric: {{metrics: …, counts: {next(iter(found))}}}, say"
        )
    if counts is not None and counts not in found:
        raise FusionKitError(
            f"task '{task}': metric '{counts}' is to count, and is not among {', '.join(found)}"
        )
    first = counts or next(iter(found))
    found = {first: found[first], **found}
    for metric in found.values():
        _try(metric, task, kind)
    facts = facts_of(found[first])
    told = settings.get("higher_is_better")
    return found, facts if told is None else replace(facts, higher_is_better=bool(told))


def metric_of(choice: MetricChoice, task: str, kind: Task) -> Metric:
    """A task's fresh metric, of several the one that counts; see `metrics_of`."""
    return next(iter(metrics_of(choice, task, kind)[0].values()))


def is_lower_better(choice: MetricChoice, task: str, kind: Task) -> bool:
    """Whether less is better of the metric that counts: of an error, say; see `metrics_of`."""
    return metrics_of(choice, task, kind)[1].higher_is_better is False


def update(metric: Metric, task: str, kind: Task, outputs: Tensor, batch: Any) -> None:
    """Let a task's metric take in the outputs of a batch.

    Raises:
        FusionKitError: it is for other outputs or labels than the task's, or the head has more or
            fewer outputs than the data have classes.
    """
    if kind.head_size and outputs.ndim == 2 and outputs.shape[-1] != kind.head_size:
        raise FusionKitError(
            f"task '{task}': its head has {outputs.shape[-1]} outputs, and its data "
            f"{kind.head_size} classes; give the data `labels`, the classes in the order of the "
            "head's rows (of a zero-shot head its own file), or the model a head of these classes"
        )
    try:
        kind.update(metric, outputs, batch)
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise FusionKitError(
            f"the metric of task '{task}', {facts_of(metric).name}, is not for what the task has, "
            f"{kind!r}: {error}"
        ) from error


def value_of(metric: Metric, task: str) -> float:
    """What a metric has come to.

    Raises:
        FusionKitError: it is more than one number.
    """
    return _number(metric.compute(), metric, task)


def _number(value: Any, metric: Metric, task: str) -> float:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise FusionKitError(
            f"the metric of task '{task}', {facts_of(metric).name}, gives more than one number; a "
            "score is one: set its `average`, say"
        )
    return float(value)


def _several(choice: MetricChoice, task: str, kind: Task) -> Metrics:
    """All metrics that are asked for, by name."""
    asked = choice.get("metrics") if isinstance(choice, dict) else None
    if asked is None:
        found = _flat(_made(choice, task, kind), task)
        return found if choice is not None else {**found, **kind.others()}
    if isinstance(asked, Mapping):
        return {name: _one(each, task, kind) for name, each in asked.items()}
    if not isinstance(asked, list):
        return _flat(_made(asked, task, kind), task)
    found = {}
    for each in asked:
        metric = _one(each, task, kind)
        name = _asked_name(each) or type(metric).__name__
        if name in found:
            raise FusionKitError(
                f"task '{task}' has two metrics '{name}': give each a name, metrics: {{NAME: …}}"
            )
        found[name] = metric
    if not found:
        raise FusionKitError(f"task '{task}': its list of metrics is empty; leave `metrics` out")
    return found


def _asked_name(choice: Any) -> str:
    """How a recipe calls a metric."""
    path = choice.get("class_path", "") if isinstance(choice, dict) else choice
    return path.rpartition(".")[2] if isinstance(path, str) else ""


def _one(choice: MetricChoice, task: str, kind: Task) -> Metric:
    found = _flat(_made(choice, task, kind), task)
    if len(found) > 1:
        raise FusionKitError(f"task '{task}': {_asked_name(choice)} is several metrics by itself")
    return next(iter(found.values()))


def _flat(made: Metric | MetricCollection, task: str) -> Metrics:
    """One metric, or those of a collection."""
    if isinstance(made, Metric):
        return {type(made).__name__: made}
    found = {str(name): each for name, each in made.items(keep_base=False, copy_state=False)}
    if not found:
        raise FusionKitError(f"task '{task}': its MetricCollection is empty")
    return found


def _made(choice: MetricChoice, task: str, kind: Task) -> Metric | MetricCollection:
    """What a name, settings or a function make."""
    settings: dict[str, Any] = choice if isinstance(choice, dict) else {"class_path": choice}
    made: Any = settings.get("class_path", "")
    if choice is None or (not made and _KEYS & settings.keys() and "class_path" not in settings):
        return kind.metric()
    given = {**(settings.get("init_args") or {}), **(settings.get("dict_kwargs") or {})}
    if not callable(made):
        made = kind.metrics.get(str(made)) or _named(made, kind)
    if isinstance(made, Metric | MetricCollection):
        return made.clone()
    try:
        known = _parameters(made)
        own = {key: value for key, value in kind.metric_arguments.items() if key in known}
        if isinstance(made, type) or own or not _takes_one(known, given):
            metric = made(**{**own, **given})
        else:
            metric = made(kind.head_size, **given)
    except Exception as error:  # of anyone's constructor
        raise FusionKitError(
            f"metric {getattr(made, '__name__', made)} of task '{task}' can't be made: {error}"
        ) from error
    if not isinstance(metric, Metric | MetricCollection):
        raise FusionKitError(f"metric of task '{task}': {metric!r} is no torchmetrics.Metric")
    return metric


def _named(path: Any, kind: Task) -> Any:
    place, _, leaf = str(path).rpartition(".")
    for package in [place] if place else [f"torchmetrics{each}" for each in _PACKAGES]:
        try:
            return getattr(import_module(package), leaf)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{package}.".startswith(f"{error.name}."):
                raise FusionKitError(f"metric '{path}' fails to import: {error}") from error
        except AttributeError:
            continue
    near = get_close_matches(leaf, [*kind.metrics, *torchmetrics.__all__], 3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise FusionKitError(
        f"there is no metric '{path}' in torchmetrics{hint or '; give its name, or an import path'}"
    )


def _parameters(made: Any) -> Mapping[str, inspect.Parameter]:
    """What makes a metric takes; torchmetrics' own by task choose a class in `__new__`."""
    if isinstance(made, type):
        made = made.__new__ if "__new__" in vars(made) else made.__init__  # type: ignore[misc]
    return inspect.signature(made).parameters


def _takes_one(known: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> bool:
    """Whether a function has a parameter of some other name for the number of classes."""
    return any(
        parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
        and name not in given
        for name, parameter in known.items()
    ) or any(parameter.kind == parameter.VAR_POSITIONAL for parameter in known.values())


def _try(metric: Metric, task: str, kind: Task) -> None:
    """Score an example, so that a metric that is for something else is told before any work."""
    example = kind.example()
    if example is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an example so small
        tried = metric.clone()
        update(tried, task, kind, *example)
        try:
            value = tried.compute()
        except Exception:  # of too few rows, say: the task's own may do
            return
    _number(value, metric, task)
