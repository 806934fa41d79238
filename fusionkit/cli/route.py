"""`fusionkit route`."""

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.disk import check_writable
from fusionkit.checkpoints.output_folder import new_file
from fusionkit.checkpoints.paths import is_remote
from fusionkit.cli import report
from fusionkit.cli.arguments import call
from fusionkit.cli.named_data import paired
from fusionkit.cli.table import Table
from fusionkit.cli.words import gathered
from fusionkit.errors import BundleError, FusionKitError, of_extra, size
from fusionkit.reuse.routing import ROUTER, router_over
from fusionkit.serving.model import served_model
from fusionkit.tasks.data_of import data_of


def run(args: list[str]) -> None:
    """Make what picks the task of a request that names none."""
    call(route, gathered(args, ("data",)), positional="bundle")


def route(
    bundle: str,
    data: list[str],
    rows: int = 64,
    base: str | None = None,
    device: str | None = None,
    seed: int = 0,
) -> None:
    """Make what picks the task of a request that names none, for `fusionkit serve --router`.

    A few training rows of each task are kept as the base model sees them, in a small file beside
    the bundle's own; a request is taken for the task of the rows that it is nearest to. Says how
    often that is right, of these rows.

    Args:
        bundle: the bundle's folder.
        data: rows of each task: a folder that has a folder or a file for each, or TASK=PATH of
            each; their labels are not used.
        rows: of each task, at most.
        base: the base model, if it is not where it was when the bundle was made.
        device: where to run: cpu, cuda.
        seed: draws the rows.
    """
    if rows < 1:
        raise FusionKitError(f"expected --rows of at least 1, got {rows}")
    opened = Bundle.load(bundle, base)
    if is_remote(opened.path):
        raise BundleError(f"{opened.path}: is not on the local disk; pull it, and try again")
    path = opened.path / ROUTER
    check_writable(path)
    of_extra("sklearn.neighbors", "serve", "a router")
    paths, _ = paired(opened.tasks, data)
    model, _ = served_model(opened, device, None)
    datamodule = data_of(paths, model=base or opened.manifest.base.source)
    batches = datamodule.calibration_dataloaders(rows, seed)
    made = router_over(model, batches, opened.manifest.base.fingerprint, rows)
    with new_file(path) as new:
        made.save(new)
    shown = Table("", ("task", "rows", "found again"), footer=1)
    found = made.found_again()
    for task, share in found.items():
        shown.add(task, str(made.of.count(task)), f"{share:.1%}")
    shown.add("mean", str(len(made.of)), f"{sum(found.values()) / len(found):.1%}")
    report.show(shown, f"written: {path} ({size(path.stat().st_size)})")
