"""How far a pass over a family is: a caller's own function, or a bar in the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from fusionkit.task_vectors.workers import Progress


@contextmanager
def followed(progress: Progress | bool | None, what: str) -> Iterator[Progress | None]:
    """What is called as tensors are done, while the context lasts.

    Args:
        progress: a function, as it is; True for a bar; or nothing.
        what: what is done, which the bar is called by.
    """
    if not isinstance(progress, bool) or not progress:
        yield progress or None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    told, count = TextColumn("{task.description}"), MofNCompleteColumn()
    with Bars(told, BarColumn(), count, TextColumn("tensors"), TimeElapsedColumn()) as bars:
        bar = bars.add_task(what, total=None)

        def update(this_pass: int, done: int, total: int) -> None:
            text = what if this_pass == 1 else f"{what} (pass {this_pass})"
            bars.update(bar, description=text, completed=done, total=total)

        yield update
