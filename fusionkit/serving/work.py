"""What the engine's thread does with rows: the contract, what is counted, and rows that fail."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from fusionkit.serving.requests import Answer, Ticket
from fusionkit.serving.served_tasks import ServedTask


class OfTask(Protocol):
    """A request, its task known."""

    ticket: Ticket
    task: ServedTask


Row = TypeVar("Row", bound=OfTask)
Found = TypeVar("Found")


@dataclass
class Tally:
    """What an engine did.

    Attributes:
        steps: calls of the model.
        rows: rows of a call → how many calls had so many.
        tasks: distinct tasks of a call → how many calls had so many.
        tokens: generated.
        prompt_tokens: read.
        predictions: rows that were classified.
        failures: requests that ended with an error.
        cancelled: requests that were taken back.
    """

    steps: int = 0
    rows: Counter[int] = field(default_factory=Counter)
    tasks: Counter[int] = field(default_factory=Counter)
    tokens: int = 0
    prompt_tokens: int = 0
    predictions: int = 0
    failures: int = 0
    cancelled: int = 0

    def step(self, tasks: Sequence[Hashable]) -> None:
        """Count a call of the model over rows of these tasks."""
        self.steps += 1
        self.rows[len(tasks)] += 1
        self.tasks[len(set(tasks))] += 1

    def figures(self) -> dict[str, Any]:
        """By the names of the engine's figures."""
        return {
            "steps_total": self.steps,
            "rows_per_step": dict(self.rows),
            "tasks_per_step": dict(self.tasks),
            "generated_tokens_total": self.tokens,
            "prompt_tokens_total": self.prompt_tokens,
            "predictions_total": self.predictions,
            "failures_total": self.failures,
            "cancelled_total": self.cancelled,
        }


class Work(Protocol[Row]):
    """Rows that an engine's thread goes on with; all but `row` is called from that thread."""

    @property
    def running(self) -> Sequence[Row]:
        """The rows that are not answered yet, but for those that wait."""

    @property
    def cache_bytes(self) -> int:
        """Bytes that the running rows take."""

    def row(self, ticket: Ticket, task: ServedTask) -> Row:
        """A row for a request, from any thread.

        Raises:
            FusionKitError: it can't be answered as it stands.
        """

    def choose(self, waiting: Sequence[Row]) -> list[Row]:
        """Those of the waiting rows, the oldest first, that may run now."""

    def turn(self, rows: Sequence[Row]) -> list[tuple[Row, Answer]]:
        """Go on by a step, with these rows, too; what clients are to be told."""

    def drop(self, rows: Collection[Row]) -> None:
        """Let rows go that are to be told no more."""

    def cancelled(self, row: Row) -> Answer | None:
        """The last that a client is told who has taken a request back."""


def by_task(rows: Sequence[Row]) -> list[Row]:
    """Rows of one task side by side, in the order in which the tasks come."""
    order = {task: place for place, task in enumerate(dict.fromkeys(row.task.name for row in rows))}
    return sorted(rows, key=lambda row: order[row.task.name])


def answered(
    rows: Sequence[Row], run: Callable[[Sequence[Row]], Found]
) -> Iterator[tuple[Sequence[Row], Found | Exception]]:
    """Run a batch; where that fails, each task's rows, and where these fail, each row alone.

    Args:
        rows: the batch.
        run: the model, over some of the rows.

    Yields:
        rows that ran together, and what came of it; or one row, and why it fails.
    """
    found: Found | Exception
    try:
        found = run(rows)
    except Exception as error:  # whatever a model, or a codec's plugin, raises
        found = error
        release(error)
        if len(rows) > 1:
            yield from _by_parts(rows, run)
            return
    yield rows, found


def _by_parts(
    rows: Sequence[Row], run: Callable[[Sequence[Row]], Found]
) -> Iterator[tuple[Sequence[Row], Found | Exception]]:
    """Each task's rows; of one task, each row."""
    names = dict.fromkeys(row.task.name for row in rows)
    parts = [[row for row in rows if row.task.name == name] for name in names]
    for part in parts if len(parts) > 1 else [[row] for row in rows]:
        yield from answered(part, run)


def no_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(
        error, MemoryError | torch.OutOfMemoryError
    ) or "can't allocate memory" in str(error)


def release(error: BaseException) -> None:
    """Let go of what a failed run held."""
    error.__traceback__ = None
    if no_memory(error) and torch.cuda.is_available():
        torch.cuda.empty_cache()
