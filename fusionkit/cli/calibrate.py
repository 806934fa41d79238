"""`fusionkit calibrate`."""

from fusionkit.calibration.calibrate import EPOCHS, calibrate
from fusionkit.cli import report
from fusionkit.cli.compress_recipe import take_bundle
from fusionkit.cli.training import TrainingCLI


def run(args: list[str]) -> None:
    """Compress the fine-tuned checkpoints of a recipe, a few scalars per task learned."""
    CalibrateCLI(args).calibrate()


class CalibrateCLI(TrainingCLI):
    """Compress the recipe's fine-tuned checkpoints calibrated, into `--model.bundle`."""

    verb = "calibrate"
    sections = ("model", "calibration")
    replaces = "the bundle"

    def check_out(self) -> None:
        """Take the bundle's folder as the place to write; it must not be there.

        Raises:
            BundleError: it is there, or none was given.
        """
        self._bundle = take_bundle(self.config)
        trainer = self.config["trainer"]
        if trainer["max_epochs"] is None and trainer["max_steps"] == -1:
            trainer["max_epochs"] = EPOCHS

    def calibrate(self) -> None:
        """Calibrate, and show what was learned."""
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
