"""`fusionkit compress`."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.cli import LightningArgumentParser
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.paths import open_path
from fusionkit.cli import report
from fusionkit.cli.launch import launched
from fusionkit.cli.recipe import RecipeCLI
from fusionkit.errors import BundleError, FusionKitError
from fusionkit.task_vectors.workers import Progress as ProgressCallback


class CompressCLI(RecipeCLI):
    """Compress the recipe's fine-tuned checkpoints into the bundle `--model.bundle`."""

    verb = "compress"
    needs_trainer = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--overwrite`."""
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the bundle")

    def before_instantiate_classes(self) -> None:
        """Take the bundle's folder as the place to write, not to read."""
        self._bundle = self.config["model"]["bundle"]
        self.config["model"]["bundle"] = None
        if self._bundle is None:
            raise FusionKitError("where to? give the bundle's folder: --model.bundle FOLDER")
        if open_path(self._bundle).exists() and not self.config["overwrite"]:
            raise BundleError(f"{self._bundle}: exists; replace it with --overwrite true")

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


@contextmanager
def progress_bar(what: str) -> Iterator[ProgressCallback]:
    """A bar that follows the passes over a family."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tensors"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not report.main_process()) as progress:
        bar = progress.add_task(what, total=None)

        def update(this_pass: int, done: int, total: int) -> None:
            text = what if this_pass == 1 else f"{what} (pass {this_pass})"
            progress.update(bar, description=text, completed=done, total=total)

        yield update
