"""Published figures beside ours: what a paper says of its models, never mixed into what we measure.

A file has the `source` and the `setting`; the `unit` of its figures, `percent` or `fraction`; the
`tasks`; under `rows` each method's `scores` by task, or their `mean` alone, and its `bits` per
parameter where the source or the method's formula says them; under `finetuned` the same of the
fine-tuned models, and under `metrics` what scores a task, by torchmetrics' name.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fusionkit.checkpoints.paths import open_path
from fusionkit.checkpoints.yaml_text import parsed_yaml
from fusionkit.errors import FusionKitError, in_line, listing, meant

if TYPE_CHECKING:
    from fusionkit.cli.front_plot import Mark

MARKED = " †"
"""How the name of a published row ends."""
_UNITS = {"percent": 100.0, "fraction": 1.0}
_KEYS = ("source", "setting", "unit", "tasks", "rows", "finetuned", "metrics")
_NEEDED = _KEYS[:5]
_ROW = ("scores", "mean", "bits")
_APART = 0.06
"""How far, in percent, a mean may be from that of the scores: both are rounded."""


@dataclass(frozen=True)
class Figures:
    """What is published of one method, as fractions.

    Attributes:
        scores: task → score; empty where the mean alone is published.
        mean: over the tasks.
        bits: per parameter; None where nothing says them.
    """

    scores: Mapping[str, float] = field(default_factory=dict)
    mean: float | None = None
    bits: float | None = None

    def mean_over(self, tasks: Sequence[str], all_tasks: Sequence[str]) -> float | None:
        """The mean over some tasks; None where it is not known.

        Args:
            tasks: over these.
            all_tasks: over which `mean` is.
        """
        if self.mean is not None and set(tasks) == set(all_tasks):
            return self.mean
        known = [self.scores[task] for task in tasks if task in self.scores]
        return statistics.fmean(known) if known and len(known) == len(tasks) else None


@dataclass(frozen=True)
class Published:
    """One published row.

    Attributes:
        name: the method's.
        source: who says so.
        setting: of what.
        tasks: over which its mean is.
        figures: what it scores.
        finetuned: what the source's fine-tuned models score.
        metrics: task → torchmetrics' name of what scores it there, where the file says it.
    """

    name: str
    source: str
    setting: str
    tasks: tuple[str, ...]
    figures: Figures
    finetuned: Figures = Figures()
    metrics: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """How tables and plots call it."""
        return self.name + MARKED

    def mean(self, tasks: Sequence[str]) -> float | None:
        """The mean score over tasks; None where it is not known."""
        return self.figures.mean_over(tasks, self.tasks)

    def share(self, tasks: Sequence[str]) -> float | None:
        """The same as a share of the source's own fine-tuned models'."""
        own, whole = self.mean(tasks), self.finetuned.mean_over(tasks, self.tasks)
        return None if own is None or not whole else own / whole

    def flat(self, tasks: Sequence[str], like: Mapping[str, Any]) -> dict[str, Any]:
        """One flat row, as those of ours are.

        Args:
            tasks: that are compared.
            like: one of ours, whose columns it has, and `source` and `setting`.
        """
        known = {
            "name": self.name,
            "kind": "published",
            "bits_per_parameter": self.figures.bits,
            "mean_score": self.mean(tasks),
            "share": self.share(tasks),
            **{f"metric/{task}": self.metrics.get(task) for task in tasks},
            **{f"score/{task}": self.figures.scores.get(task) for task in tasks},
        }
        row = {column: known.get(column) for column in like}
        return {**row, "source": self.source, "setting": self.setting}

    def mark(self, tasks: Sequence[str], by_share: bool) -> "Mark | None":
        """How it is plotted; None where its size or what it keeps is not known.

        Args:
            tasks: that are compared.
            by_share: height is a share, not a mean score.
        """
        from fusionkit.cli.front_plot import Mark

        value = self.share(tasks) if by_share else self.mean(tasks)
        if value is None or not self.figures.bits:
            return None
        return Mark(self.title, "", self.figures.bits, value)


def published_in(paths: Sequence[str | Path]) -> list[Published]:
    """Read files of published figures; rows of one name are told apart by their setting.

    Raises:
        FusionKitError: as of `read_published`.
    """
    rows = [row for path in paths for row in read_published(path)]
    names = [row.name for row in rows]
    return [
        replace(row, name=f"{row.name}, {row.setting.partition(',')[0]}")
        if names.count(row.name) > 1
        else row
        for row in rows
    ]


def read_published(path: str | Path) -> list[Published]:
    """Read a file of published figures.

    Args:
        path: a YAML file; see above what it has.

    Raises:
        FusionKitError: it is no such file; the message lists all that is wrong with it.
    """
    file = open_path(path)
    try:
        content = parsed_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise FusionKitError(f"{file}: not a readable YAML file ({error})") from error
    faults = _faults(content)
    if faults:
        raise FusionKitError(f"{file}: is no file of published figures:{listing(faults)}")
    times = _UNITS[content["unit"]]
    tasks = tuple(content["tasks"])
    source, setting = (str(content[key]).strip() for key in ("source", "setting"))
    finetuned = _figures(content.get("finetuned") or {}, times)
    metrics = content.get("metrics") or {}
    return [
        Published(str(name), source, setting, tasks, _figures(row, times), finetuned, metrics)
        for name, row in content["rows"].items()
    ]


def unlike(rows: Sequence[Published], metrics: Mapping[str, str]) -> list[str]:
    """Published scores that are by another metric than ours, a finding each.

    Args:
        rows: what is published.
        metrics: task → the metric that scores it here.
    """
    found = {
        f"{task} is by {theirs} in {row.setting}, by {metrics[task]} here"
        for row in rows
        for task, theirs in row.metrics.items()
        if task in metrics and not metrics[task].endswith(theirs)
    }
    return sorted(found)


def _figures(row: Mapping[str, Any], times: float) -> Figures:
    scores = {task: value / times for task, value in (row.get("scores") or {}).items()}
    mean = row.get("mean")
    return Figures(scores, None if mean is None else mean / times, row.get("bits"))


def _faults(content: Any) -> list[str]:
    """All that is wrong with a file's content."""
    if not isinstance(content, dict):
        return [f"expected a mapping of {', '.join(_KEYS)}"]
    faults = [_unknown(key, _KEYS) for key in content if key not in _KEYS]
    faults += [f"`{key}` is missing" for key in _NEEDED if not content.get(key)]
    if faults:
        return faults
    tasks, rows = content["tasks"], content["rows"]
    if content["unit"] not in _UNITS:
        faults.append(f"`unit` is {' or '.join(_UNITS)}, got {content['unit']!r}")
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        faults.append("`tasks` is a list of names")
    if not isinstance(rows, dict):
        faults.append("`rows` is a mapping: a method's name → its scores, mean and bits")
    metrics = content.get("metrics") or {}
    if not isinstance(metrics, dict) or not all(isinstance(v, str) for v in metrics.values()):
        faults.append("`metrics` is a mapping: a task → torchmetrics' name of what scores it")
    if faults:
        return faults
    high = _UNITS[content["unit"]]
    named = {**rows, "finetuned": content.get("finetuned") or {"mean": high}}
    for name, row in named.items():
        faults += [f"'{name}': {fault}" for fault in _faults_of_row(row, tasks, high)]
    others = sorted(set(metrics) - set(tasks), key=str)
    return faults + [f"`metrics` names {task}, which `tasks` lacks" for task in others]


def _faults_of_row(row: Any, tasks: Sequence[str], high: float) -> list[str]:
    if not isinstance(row, dict) or not (row.get("scores") or row.get("mean") is not None):
        return ["expected `scores` by task, or a `mean`"]
    faults = [_unknown(key, _ROW) for key in row if key not in _ROW]
    scores, mean = row.get("scores") or {}, row.get("mean")
    if not isinstance(scores, dict):
        return ["`scores` is a mapping: a task → its score"]
    strange = [task for task in scores if task not in tasks]
    faults += [f"a score of {task}, which `tasks` lacks" for task in strange]
    numbers = dict(scores) if mean is None else {**scores, "mean": mean}
    faults += [
        f"{key}: expected a number up to {high:g}, by its `unit`, got {value!r}"
        for key, value in numbers.items()
        if not _is_number(value, high)
    ]
    bits = row.get("bits")
    if bits is not None and not (_is_number(bits, math.inf) and bits > 0):
        faults.append(f"bits: expected a number of bits per parameter, got {bits!r}")
    if faults:
        return faults
    if mean is not None and len(scores) == len(tasks):
        own = statistics.fmean(scores.values())
        if abs(own - mean) > _APART * high / 100:
            faults.append(f"its mean is {mean:g}, that of its scores {own:.2f}")
    if mean is None and (lacking := [task for task in tasks if task not in scores]):
        faults.append(f"neither a mean nor a score of {in_line(lacking)}")
    return faults


def _is_number(value: Any, high: float) -> bool:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and math.isfinite(value) and abs(value) <= high


def _unknown(key: Any, known: Sequence[str]) -> str:
    return f"no key '{key}'{meant(str(key), known) or ';'} there is {', '.join(known)}"
