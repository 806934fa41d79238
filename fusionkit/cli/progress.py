"""How far a pass over a family is, in the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fusionkit.cli import report
from fusionkit.task_vectors.workers import Progress as ProgressCallback


@contextmanager
def progress_bar(what: str, shown: bool = True) -> Iterator[ProgressCallback]:
    """A bar that follows the passes over a family.

    Args:
        what: what is done.
        shown: it is to be seen at all.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tensors"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not shown or not report.main_process()) as progress:
        bar = progress.add_task(what, total=None)

        def update(this_pass: int, done: int, total: int) -> None:
            text = what if this_pass == 1 else f"{what} (pass {this_pass})"
            progress.update(bar, description=text, completed=done, total=total)

        yield update
