"""`fusionkit compress`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.format import MANIFEST
from fusionkit.checkpoints.output_folder import check_replaceable
from fusionkit.cli import report
from fusionkit.cli.launch import launched
from fusionkit.cli.recipe import RecipeCLI
from fusionkit.errors import BundleError
from fusionkit.task_vectors.workers import Progress as ProgressCallback


def run(args: list[str]) -> None:
    """Compress fine-tuned checkpoints into a bundle: the recipe's `model.bundle`."""
    report.show(report.bundle_table(CompressCLI(args).compress()))


class CompressCLI(RecipeCLI):
    """Compress the recipe's fine-tuned checkpoints into the bundle `--model.bundle`."""

    verb = "compress"
    needs_trainer = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--overwrite`."""
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the bundle")

    def before_instantiate_classes(self) -> None:
        """Take the bundle's folder as the place to write, not to read."""
        self._bundle = take_bundle(self.config)

    def compress(self) -> Bundle:
        """Compress, with a progress bar; among the processes that the recipe's trainer has."""
        with (
            launched(self.config["trainer"]) as (processes, device),
            progress_bar("compressing") as callback,
        ):
            bundle: Bundle = self.model.compress(
                self._bundle,
                self.config["overwrite"],
                callback,
                processes=processes,
                device=device,
            )
        return bundle


def take_bundle(config: Any) -> str:
    """Take a recipe's bundle as the place to write, not to read, and see that it may be written.

    Args:
        config: the recipe, parsed; its bundle is taken out.

    Raises:
        BundleError: there is something already, or no place was given.
    """
    bundle: str | None = config["model"]["bundle"]
    config["model"]["bundle"] = None
    if bundle is None:
        raise BundleError("where to? give the bundle's folder: --model.bundle FOLDER")
    mend = "replace it with --overwrite true"
    check_replaceable(bundle, config["overwrite"], known_by=MANIFEST, mend=mend)
    return bundle


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
