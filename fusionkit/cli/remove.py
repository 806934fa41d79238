"""`fusionkit remove`."""

from fusionkit.bundles.bundle import Bundle
from fusionkit.cli import report
from fusionkit.cli.arguments import call
from fusionkit.errors import BundleError, lacks


def run(args: list[str]) -> None:
    """Take tasks out of a bundle."""
    call(remove, args, positional="bundle", several="tasks")


def remove(bundle: str, tasks: list[str]) -> None:
    """Take tasks out of a bundle; the others' files are not touched.

    Args:
        bundle: the bundle's folder.
        tasks: their names.

    Raises:
        BundleError: the bundle has no such task, or it would have none left; nothing is removed.
    """
    opened = Bundle.load(bundle)
    for task in tasks:
        if task not in opened.tasks:
            raise BundleError(lacks(f"{bundle}:", task, opened.tasks))
    if set(tasks) == set(opened.tasks):
        raise BundleError(f"{bundle}: no task would be left; delete the folder instead")
    for task in dict.fromkeys(tasks):
        opened.remove(task)
    report.show(f"removed from {bundle}: {', '.join(tasks)}; left: {', '.join(opened.tasks)}")
