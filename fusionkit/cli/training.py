"""What the verbs share by which something is trained: `fit`, `calibrate` and `fuse`."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser

from fusionkit.checkpoints.paths import written_out
from fusionkit.cli.recipe import RecipeCLI


class TrainingCLI(RecipeCLI, ABC):
    """A recipe by which something is trained, with Lightning's own checkpoints.

    A subclass says what is written, in `check_out`, and what `--overwrite` replaces.
    """

    replaces = ""
    trainer_settings: ClassVar[dict[str, Any]] = {"logger": False, "enable_model_summary": False}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--ckpt_path`, `--overwrite`, and Lightning's checkpointing as `--checkpoint`."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {"checkpoint.save_last": True, "checkpoint.enable_version_counter": False}
        )
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="resume: a checkpoint, or 'last'"
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help=f"replace {self.replaces}"
        )

    def before_instantiate_classes(self) -> None:
        """Refuse what would be lost, and keep Lightning's files beside the results."""
        self.check_out()
        trainer = self.config["trainer"]
        root, own = trainer["default_root_dir"], self.config["checkpoint"]["dirpath"]
        trainer["default_root_dir"] = written_out(str(root or self.config["out"]))
        self.config["checkpoint"]["dirpath"] = written_out(
            str(own or Path(self.config["out"]) / "checkpoints")
        )
        if trainer["enable_checkpointing"] is False:  # Lightning refuses to be given one, then
            keys = self.parser.callback_keys
            self.parser.callback_keys = [key for key in keys if key != "checkpoint"]

    @abstractmethod
    def check_out(self) -> None:
        """Refuse to write over what is there.

        Raises:
            BundleError: it is there.
        """
