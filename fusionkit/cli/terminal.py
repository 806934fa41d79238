"""What the verbs print: to the terminal, or to a pipe."""

import sys

from rich.console import Console


def main_process() -> bool:
    """Whether this is the only process, or the one of several that reports."""
    module = sys.modules.get("lightning.pytorch.utilities.rank_zero")  # whoever spreads has it
    return module is None or not module.rank_zero_only.rank


def show(*items: object) -> None:
    """Print to the terminal, of several processes from one; a pipe gets lines of table width."""
    if not main_process():
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for item in items:
        console.print(item, highlight=False, markup=False, soft_wrap=isinstance(item, str))
