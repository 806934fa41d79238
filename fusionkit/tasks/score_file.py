"""scores.json: what was scored, how and by what, so that later scores can be related to it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusionkit.checkpoints.paths import open_path
from fusionkit.errors import DataError
from fusionkit.tasks.scores import Scores

FORMAT = 1
_AGAIN = "measure them again with 'fusionkit test', or give the numbers, task by task"


@dataclass(frozen=True)
class KnownScores:
    """Scores that others are related to.

    Attributes:
        finetuned: task → the fine-tuned model's own score.
        base: task → the base's.
        metrics: task → the metric's name, where a file says it.
        limit: what kept rows from being scored; None where that is not known.
        source: the file, for messages.
    """

    finetuned: dict[str, float] | None = None
    base: dict[str, float] | None = None
    metrics: Mapping[str, str] = field(default_factory=dict)
    limit: str | None = None
    source: str = ""

    def check(self, metrics: Mapping[str, str], limit: str) -> None:
        """Check that scores are of the tasks, metrics and rows that are to be related to them.

        Args:
            metrics: task → name of its metric, of what is to be scored.
            limit: what keeps rows from being scored.

        Raises:
            DataError: they are of others.
        """
        for task, name in metrics.items() if self.source else ():
            if task not in self.metrics:
                raise DataError(
                    f"{self.source}: has no score of task '{task}'; it has "
                    f"{', '.join(self.metrics)}; {_AGAIN}"
                )
            if self.metrics[task] != name:
                raise DataError(
                    f"{self.source}: task '{task}' was scored by {self.metrics[task]}, and is now "
                    f"scored by {name}; give that `metric`, or {_AGAIN}"
                )
        if self.limit is not None and self.limit != limit:
            raise DataError(
                f"{self.source}: was scored over {_rows(self.limit)}, and this is over "
                f"{_rows(limit)}; {_AGAIN}"
            )


def known_scores(
    finetuned: Mapping[str, float] | str | Path | None, base: Mapping[str, float] | None = None
) -> KnownScores:
    """Scores as they were given: by task, or the scores.json of an earlier run.

    Args:
        finetuned: the fine-tuned models' own.
        base: the base's, which go before what a file says.

    Raises:
        DataError: the file is no scores.json of this version, or not of fine-tuned models.
    """
    if not isinstance(finetuned, str | Path):
        return KnownScores(dict(finetuned) if finetuned else None, dict(base) if base else None)
    path = open_path(finetuned)
    content = _read(path)
    if content["codec"] is not None:
        raise DataError(
            f"{path}: are scores of {content['model']}, not of the fine-tuned models themselves; "
            "those are scored by 'fusionkit test' with `codec` and `bundle` left out"
        )
    tasks = content["tasks"]
    own = {task: each["base"] for task, each in tasks.items() if each["base"] is not None}
    return KnownScores(
        {task: each["score"] for task, each in tasks.items()},
        {**own, **(base or {})} or None,
        {task: each["metric"] for task, each in tasks.items()},
        content["limit"],
        str(path),
    )


def shown_scores(path: str | Path) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """What a table says of a scores.json: its columns, and their cells by task.

    Raises:
        DataError: the file is no scores.json of this version.
    """
    tasks = _read(open_path(path))["tasks"]
    keys = ("metric", "score", "finetuned", "share")
    cells = {task: tuple(_cell(each.get(key)) for key in keys) for task, each in tasks.items()}
    return ("metric", "score", "fine-tuned", "share"), cells


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def score_file(scores: Scores, model: str, codec: Mapping[str, Any] | None) -> bytes:
    """The content of a scores.json.

    Args:
        scores: what was scored.
        model: what it was scored of, for whoever reads it.
        codec: its codec's configuration; None of fine-tuned models themselves.
    """
    *rows, mean = scores.rows()
    tasks = {}
    for row in rows:
        measured = scores.of(row["task"])
        own = {"higher_is_better": not measured.lower, "others": dict(measured.others)}
        tasks[row.pop("task")] = {**row, **own}
    content = {
        "format": FORMAT,
        "fusionkit": version("fusionkit"),
        "model": model,
        "codec": codec,
        "limit": scores.limit,
        "rows": mean["rows"],
        "tasks": {
            task: {k: v for k, v in each.items() if k != "task"} for task, each in tasks.items()
        },
        "mean": {key: mean[key] for key in ("score", "low", "high", "finetuned", "share")},
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def _read(path: Path) -> dict[str, Any]:
    """A scores.json that says what is asked of it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read as a scores.json: {error}") from error
    keys: Sequence[str] = ("fusionkit", "model", "codec", "limit", "tasks")
    if not isinstance(content, dict) or not {"format", *keys} <= content.keys():
        raise DataError(f"{path}: is no scores.json of 'fusionkit test'; {_AGAIN}")
    if content["format"] != FORMAT or content["fusionkit"] != version("fusionkit"):
        raise DataError(
            f"{path}: was written by FusionKit {content['fusionkit']}, and this is "
            f"{version('fusionkit')}; scores of another version may be of other rows: {_AGAIN}"
        )
    return content


def _rows(limit: str) -> str:
    return f"a part of the rows ({limit})" if limit else "all rows"
