"""`fusionkit calibrate`."""

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from fusionkit.calibration.calibrate import EPOCHS, calibrate
from fusionkit.checkpoints.paths import open_path
from fusionkit.cli import report
from fusionkit.cli.fit import FitCLI
from fusionkit.cli.recipe import RecipeCLI
from fusionkit.errors import BundleError


class CalibrateCLI(FitCLI):
    """Compress the recipe's fine-tuned checkpoints calibrated, into `--model.bundle`."""

    verb = "calibrate"

    def add_model_arguments(self, parser: LightningArgumentParser) -> None:
        """ReuseModule's."""
        RecipeCLI.add_model_arguments(self, parser)

    def check_out(self) -> None:
        """Take the bundle's folder as the place to write; it must not be there.

        Raises:
            BundleError: it is there, or none was given.
        """
        self._bundle = self.config["model"]["bundle"]
        self.config["model"]["bundle"] = None
        if self._bundle is None:
            raise BundleError("where to? give the bundle's folder: --model.bundle FOLDER")
        if open_path(self._bundle).exists() and not self.config["overwrite"]:
            raise BundleError(f"{self._bundle}: exists; replace it with --overwrite true")
        trainer = self.config["trainer"]
        if trainer["max_epochs"] is None and trainer["max_steps"] == -1:
            trainer["max_epochs"] = EPOCHS

    def calibrate(self) -> Path:
        """Calibrate, and show what was learned.

        Returns:
            the bundle's folder.
        """
        if self.trainer.is_global_zero:
            self.save_config()
        bundle = calibrate(
            self.model,
            self.datamodule,
            self._bundle,
            settings=self.config_init["calibration"],
            trainer=self.trainer,
            ckpt_path=self.config["ckpt_path"],
            overwrite=self.config["overwrite"],
        )
        if self.trainer.is_global_zero:
            report.show(report.calibration_table(bundle), f"written: {self._bundle}")
        return Path(self._bundle)
