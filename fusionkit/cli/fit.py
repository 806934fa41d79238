"""`fusionkit fit`: a LightningModule trained by the Trainer, its flags and its checkpoints."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from fusionkit.checkpoints.disk import Needed, check_space, check_writable
from fusionkit.checkpoints.paths import is_there, refuse_existing
from fusionkit.cli import report
from fusionkit.cli.training import TrainingCLI
from fusionkit.errors import BundleError
from fusionkit.tasks.finetune import KINDS, Finetune
from fusionkit.tasks.training import fit

FINETUNED = "finetuned"
"""The folder, inside `--out`, of what was fine-tuned."""


def run(args: list[str]) -> None:
    """Fine-tune one task of a recipe, in full or by an adapter."""
    FitCLI(args).fit()


class FitCLI(TrainingCLI):
    """Fine-tune one task of the recipe: `--model.task`; written to `--out`/finetuned."""

    verb = "fit"
    settings_of = Finetune
    replaces = "the fine-tune"

    def add_model_arguments(self, parser: LightningArgumentParser) -> None:
        """Any LightningModule's that trains; `Finetune`'s as a rule."""
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)

    def check_out(self) -> None:
        """Refuse to write over what is there.

        Raises:
            BundleError: it is there.
        """
        out = Path(self.config["out"]) / FINETUNED
        refuse_existing(out, self.config["overwrite"], "replace it with --overwrite")
        check_writable(out)
        if is_there(out) and not any((out / file).is_file() for file in KINDS):
            raise BundleError(f"{out}: exists and is no fine-tune; give another --out")

    def fit(self) -> Path | None:
        """Train, then write what was trained.

        Returns:
            the path to give as a fine-tuned checkpoint; None of a module that saves nothing.

        Raises:
            FusionKitError: there is no checkpoint to resume from.
        """
        if self.trainer.is_global_zero:
            self.save_config()
        return train(
            self.trainer,
            self.model,
            self.datamodule,
            self.out / FINETUNED,
            ckpt_path=self.config["ckpt_path"],
            overwrite=self.config["overwrite"],
        )


def train(
    trainer: Any,
    module: LightningModule,
    datamodule: Any,
    out: Path,
    ckpt_path: str | None = None,
    overwrite: bool = False,
) -> Path | None:
    """Fit a module through the Trainer, and save it where it can be saved.

    Args:
        trainer: the Lightning Trainer.
        module: what to train.
        datamodule: its data.
        out: the folder for what `Finetune.save` writes.
        ckpt_path: resume from this checkpoint; `last`: from the newest.
        overwrite: replace what is there.

    Raises:
        FusionKitError: there is no checkpoint to resume from, or it is of another fine-tuning.
        BundleError: what is trained can't fit on the disk.
        KeyboardInterrupt: training was interrupted; nothing is saved but checkpoints.
    """
    if isinstance(module, Finetune):
        datamodule = module.data_of(datamodule)
        module.prepare(datamodule)  # here: the main process saves what other processes train
        if trainer.is_global_zero:
            check_space(out, _needs(module, bool(trainer.checkpoint_callbacks)))
    fit(trainer, module, datamodule, ckpt_path)
    if not isinstance(module, Finetune) or not trainer.is_global_zero:
        return None
    path = module.save(out, overwrite)
    report.show(f"written: {path}")
    return path


def _needs(module: LightningModule, checkpoints: bool) -> Needed:
    """What is trained; and, likely, a checkpoint of it with two moments of an optimizer."""
    sizes = {p: p.nbytes for p in module.parameters()}
    trained = sum(nbytes for each, nbytes in sizes.items() if each.requires_grad)
    return Needed(trained, trained + checkpoints * (2 * trained + sum(sizes.values())))
