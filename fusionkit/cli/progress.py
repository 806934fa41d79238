"""How far a pass over a family is, in the terminal."""

from contextlib import AbstractContextManager

from fusionkit.cli.terminal import main_process
from fusionkit.task_vectors.progress import followed
from fusionkit.task_vectors.workers import Progress


def progress_bar(what: str, shown: bool = True) -> AbstractContextManager[Progress | None]:
    """A bar that follows the passes over a family; the main process's alone.

    Args:
        what: what is done.
        shown: it is to be seen at all.
    """
    return followed(shown and main_process(), what)
