"""`fusionkit add`."""

from fusionkit.bundles.add_tasks import add_tasks
from fusionkit.bundles.bundle import Bundle
from fusionkit.cli import report
from fusionkit.cli.arguments import call
from fusionkit.cli.named_models import named_models
from fusionkit.cli.progress import progress_bar


def run(args: list[str]) -> None:
    """Add fine-tuned models to a bundle."""
    call(add, args, positional="bundle", several="finetuned")


def add(
    bundle: str, finetuned: list[str], base: str | None = None, keep_shared: bool = False
) -> None:
    """Add fine-tuned models to a bundle; the tasks in it are not touched.

    Args:
        bundle: the bundle's folder.
        finetuned: paths, globs, or NAME=PATH to say what a task is called.
        base: the base model, if it is not where it was when the bundle was made.
        keep_shared: where tasks share a vector (EMR, a merge), encode against it as it is.
    """
    opened = Bundle.load(bundle, base)
    named, left_out = named_models(finetuned, base or opened.manifest.base.source)
    if left_out:
        report.show(f"left out, no model, or the base itself: {', '.join(left_out)}")
    with progress_bar("adding") as callback:
        add_tasks(opened, named, keep_shared=keep_shared, progress=callback)
    report.show(report.bundle_table(opened), f"added to {bundle}: {', '.join(named)}")
