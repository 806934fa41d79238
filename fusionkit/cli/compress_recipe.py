"""`fusionkit compress --config R.yaml`: the checkpoints of a recipe, streamed."""

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.compress import compress
from fusionkit.bundles.format import MANIFEST
from fusionkit.checkpoints.checkpoint import Checkpoint, find_checkpoints
from fusionkit.checkpoints.output_folder import check_replaceable
from fusionkit.cli import report
from fusionkit.cli.launch import launched
from fusionkit.cli.progress import progress_bar
from fusionkit.cli.recipe import RecipeCLI
from fusionkit.errors import BundleError, FusionKitError


def run(args: list[str]) -> None:
    """Compress a recipe's fine-tuned checkpoints into its bundle."""
    report.show(report.bundle_table(CompressCLI(args).compress()))


class CompressCLI(RecipeCLI):
    """Compress the recipe's fine-tuned checkpoints into the bundle `--model.bundle`."""

    verb = "compress"
    needs_trainer = writes_out = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--overwrite`; the network itself is needed only where no base is given."""
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the bundle")
        for action in parser._actions:
            if action.dest == "model.model":
                action.required = False

    def before_instantiate_classes(self) -> None:
        """Take the bundle's folder as the place to write, not to read."""
        self._bundle = take_bundle(self.config)

    def instantiate_classes(self) -> None:
        """Build codec and checkpoints alone, where they say all that there is to know.

        Of a base whose class no configuration says, the network does.
        """
        self.model = None
        own = self.config["model"]
        if own["base"] is not None:
            network, data = own["model"], self.config["data"]
            own["model"] = self.config["data"] = None
            made = self.parts_of(self.config)["model"]
            own["model"], self.config["data"] = network, data
            if network is None or Checkpoint.of(made["base"]).architecture is not None:
                self._parts = made
                return
        elif own["model"] is None:
            raise FusionKitError(
                "there is no base: give --model.base PATH, or the network itself as model.model"
            )
        super().instantiate_classes()

    def compress(self) -> Bundle:
        """Compress, with a progress bar; among the processes that the recipe's trainer has."""
        with (
            launched(self.config["trainer"]) as (processes, device),
            progress_bar("compressing") as callback,
        ):
            where: Any = {"progress": callback, "processes": processes, "device": device}
            overwrite = self.config["overwrite"]
            if self.model is not None:
                bundle: Bundle = self.model.compress(self._bundle, overwrite, **where)
                return bundle
            own = self._parts
            if own["codec"] is None or not own["finetuned"]:
                raise FusionKitError(
                    "compressing needs both `codec` and `finetuned`; add what is missing"
                )
            found = own["finetuned"]
            return compress(
                own["base"],
                find_checkpoints(found) if isinstance(found, str) else found,
                own["codec"],
                self._bundle,
                overwrite=overwrite,
                adapters=own["adapters"],
                private=own["private"] or (),
                frozen=own["frozen"] or (),
                rename=own["rename"],
                ignore=own["ignore"] or (),
                **where,
            )


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
    check_replaceable(
        bundle, config["overwrite"], known_by=MANIFEST, mend="replace it with --overwrite"
    )
    return bundle
