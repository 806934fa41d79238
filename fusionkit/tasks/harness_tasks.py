"""lm-eval's tasks, found by name or file and loaded with their data sets."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusionkit.checkpoints.paths import written_out
from fusionkit.errors import DataError, in_line, meant
from fusionkit.tasks.facts import Facts

PARTS = ("acc", "exact_match", "f1", "em")
"""Metrics that lie in [0, 1], with what begins so (`acc_norm`): lm-eval does not say it."""


@dataclass(frozen=True)
class HarnessTasks:
    """Some of lm-eval's tasks, loaded.

    Attributes:
        parts: names of what has a score: tasks, and groups that are scored as one; the first
            counts.
        loaded: what lm-eval's `evaluate` takes.
        metrics: name → what is known of the metric; of other parts than the first `PART/name`.
        documents: how many are scored of the first part.
        digest: of configurations and documents.
    """

    parts: tuple[str, ...]
    loaded: Any = field(repr=False, compare=False)
    metrics: Mapping[str, Facts] = field(repr=False)
    documents: int
    digest: str

    def values(self, results: Mapping[str, Any]) -> dict[str, float]:
        """Metrics and their standard errors, as lm-eval calls them.

        Args:
            results: as lm-eval's `evaluate` returns them.
        """
        return {
            self.shown(part, key): float(value)
            for part in self.parts
            for key, value in {**results["results"], **results.get("groups", {})}[part].items()
            if "," in key and isinstance(value, int | float)
        }

    def rows(self, results: Mapping[str, Any], metric: str) -> list[float] | None:
        """Each document's own value of a metric; None where it is no number, or of a group."""
        first = self.parts[0]
        for key in [f"{metric},none", metric]:
            name, _, chosen = key.partition(",")
            found = [
                sample.get(name)
                for sample in sorted(results["samples"].get(first, ()), key=_document)
                if sample["filter"] == chosen
            ]
            if found and all(isinstance(value, int | float) for value in found):
                return [float(value) for value in found]
        return None

    def shown(self, part: str, key: str) -> str:
        """How tables call what lm-eval calls `acc,none`."""
        name = key.removesuffix(",none")
        return name if part == self.parts[0] else f"{part}/{name}"


def task_manager(names: Sequence[str], include_path: Sequence[str], metadata: Any) -> Any:
    """lm-eval's task manager, with its own tasks only if they are needed: that takes seconds.

    Args:
        names: what is to be loaded by it.
        include_path: folders with tasks, too.
        metadata: for the tasks.

    Raises:
        DataError: there is no such folder, or file.
    """
    from lm_eval.tasks import TaskManager

    for name in names:
        _check_file(name)
    folders = [written_out(each) for each in include_path]
    for folder in folders:
        if not Path(folder).is_dir():
            raise DataError(
                f"include_path: {folder} is no folder; give one with lm-eval YAML files"
            )
    settings: dict[str, Any] = {"include_path": folders, "metadata": dict(metadata or {})}
    small = TaskManager(include_defaults=False, **settings)
    if all(_is_known(small.task_index, written_out(name)) for name in names):
        return small
    return TaskManager(**settings)


def load_tasks(manager: Any, names: Sequence[str], limit: int | None) -> HarnessTasks:
    """Load tasks, and their data sets.

    Args:
        manager: lm-eval's task manager.
        names: of tasks, groups or tags, or paths of YAML files.
        limit: documents of each task.

    Raises:
        DataError: there is no such task, its data set can't be had, or it has no score of its own.
    """
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    parts: list[str] = []
    for name in names:
        own = _loaded(manager, name)
        for part, each in own.items():
            loaded[part].update(each)
        top = next(iter(own["groups"]), None)
        whole = top is not None and own["groups"][top].has_aggregation
        if not whole and len(own["tasks"]) > 1 and not parts:
            raise DataError(
                f"lm-eval's '{name}' has no score of its own, but its tasks have; list those that "
                f"are meant, the one that counts first: [{in_line(list(own['tasks']))}]"
            )
        parts += [top] if whole and top is not None else list(own["tasks"])
    found = HarnessTasks(tuple(dict.fromkeys(parts)), loaded, {}, 0, "")
    members = _members(loaded, found.parts[0])
    return HarnessTasks(
        found.parts,
        loaded,
        {
            found.shown(part, key): facts
            for part in found.parts
            for key, facts in _metrics(loaded, part)
        },
        sum(_count(task, limit) for task in members),
        _digest(loaded["tasks"].values(), limit),
    )


def _loaded(manager: Any, name: str) -> dict[str, Any]:
    """One task, or a group's or a tag's."""
    spec = written_out(name)
    if name not in manager.task_index and not Path(spec).is_file():
        raise DataError(
            f"lm-eval has no task '{name}'{meant(name, manager.all_tasks)}; 'lm_eval ls tasks' "
            "lists all; give a YAML file's path, or its folder as `include_path`, for your own"
        )
    try:
        found = dict(manager.load([spec]))
    except ImportError as error:
        package = (error.name or "what it needs").partition(".")[0]
        raise DataError(
            f"lm-eval's task '{name}' needs {package}; pip install {package}, or the extra of "
            "lm_eval that its README names"
        ) from error
    except Exception as error:  # tasks are programs, and raise what they like
        raise DataError(_unloadable(name, error)) from error
    return {"groups": {}, "group_map": {}, **found}


def _check_file(name: str) -> None:
    """Check that what looks like a file is one of a task."""
    path = Path(written_out(name))
    if name.endswith((".yaml", ".yml")) and not path.is_file():
        raise DataError(f"{name}: no such file; expected the YAML file of an lm-eval task")
    if path.is_file() and "group" in (content := _content(path)):
        raise DataError(
            f"{name}: is a group of tasks, which lm-eval finds by name: give "
            f"'{content['group']}', and as `include_path` its folder, {path.parent}"
        )


def _unloadable(name: str, error: Exception) -> str:
    said = " ".join((str(error) or type(error).__name__).split())[:300]
    if isinstance(error, ConnectionError) or "offline" in said.lower():
        return (
            f"lm-eval's task '{name}' needs a data set from the network, which can't be reached "
            f"({said}); run it once where it can, so that the data set is cached, or give a YAML "
            "file whose `dataset_kwargs: {data_files: …}` are local"
        )
    return f"lm-eval's task '{name}' can't be loaded: {said}"


def _is_known(index: Mapping[str, Any], name: str) -> bool:
    """Whether a task or group needs none that is not in an index."""
    if name in index:
        path = index[name].yaml_path
        return path is None or _has_members(index, _content(path))
    return Path(name).is_file() and _has_members(index, _content(name))


def _has_members(index: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    members = content.get("task")
    named = [each for each in members if isinstance(each, str)] if isinstance(members, list) else []
    return all(_is_known(index, each) for each in named)


def _content(path: str | Path) -> dict[str, Any]:
    """A YAML file as lm-eval reads it; what can't be read is told when it is loaded."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        found = load_yaml(path, resolve_func=False)
    except Exception:  # of anyone's YAML
        return {}
    return found if isinstance(found, dict) else {}


def _members(loaded: Mapping[str, Any], part: str) -> list[Any]:
    """The tasks that a part's score is of."""
    if part in loaded["groups"]:
        found: list[Any] = loaded["groups"][part].get_all_tasks()
        return found
    return [loaded["tasks"][part]]


def _metrics(loaded: Mapping[str, Any], part: str) -> Iterator[tuple[str, Facts]]:
    """A part's metrics by lm-eval's keys (`acc,none`)."""
    tasks = _members(loaded, part)
    higher = {name: way for task in tasks for name, way in task.higher_is_better().items()}
    filters = [each["name"] for each in tasks[0].get_config("filter_list") or [{"name": "none"}]]
    names = dict.fromkeys(higher, filters)
    if part in loaded["groups"]:
        told = loaded["groups"][part].aggregate_metric_list
        names = {each.metric: list(each.filter_list or filters) for each in told}
    for name, chosen in names.items():
        within = name in PARTS or name.startswith(tuple(f"{each}_" for each in PARTS))
        for each in chosen:
            key = f"{name},{each}"
            bounds = (0.0, 1.0) if within else (None, None)
            yield key, Facts(key.removesuffix(",none"), higher.get(name), *bounds)


def _count(task: Any, limit: int | None) -> int:
    count = len(task.eval_docs)
    return count if limit is None else min(limit, count)


def _digest(tasks: Any, limit: int | None) -> str:
    """What tells tasks from others: their configurations, and the documents that are scored."""
    digest = hashlib.sha256()
    for task in tasks:
        config = json.dumps(task.dump_config(), sort_keys=True, default=_name)
        digest.update(config.encode())
        for place, document in enumerate(task.eval_docs):
            if limit is not None and place >= limit:
                break
            digest.update(repr(document).encode())
    return digest.hexdigest()[:16]


def _name(value: Any) -> str:
    return str(getattr(value, "__qualname__", type(value).__name__))


def _document(sample: Mapping[str, Any]) -> int:
    return int(sample["doc_id"])
