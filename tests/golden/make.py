"""Makes the golden files, with the code of commit 2f7cbd2, before it was laid out in packages.

It documents how they were made, and is run by no test: today's code has none of these names.
With 2f7cbd2 installed (torch 2.14.1, lightning 2.6.6, peft 0.21), from the folder `tests`:

    python -m golden.make && python -m golden.expect
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from fusionkit.calibrating import calibrate
from fusionkit.finetune import Finetune
from fusionkit.module import ReuseModule
from golden.net import FOLDER, FROZEN, PRIVATE, ROWS, TASKS, Net, Rows, base, finetuned
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusionkit import DBMS, EMR, SVD, Calibration, MagnitudePrune, compress

CALIBRATION_EPOCHS, CALIBRATION_KEPT = 20, 10
FINETUNE_EPOCHS, FINETUNE_KEPT = 4, 2


class Save(Checkpoint):
    """Saves one checkpoint, when so many epochs have run; it holds no path, as Lightning's does."""

    def __init__(self, path: Path, epochs: int) -> None:
        self.path, self.epochs = path, epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)


def trainer(epochs: int, save: Save) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=[save],
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def make_family() -> None:
    """A base; and models that moved all but a bias, one statistic each, and a few of them far."""
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.place.normal_()
        net.norm.running_mean.normal_(std=0.1)
    save_file({n: t for n, t in net.state_dict().items() if n != "decoder.weight"}, _BASE)
    start = load_file(_BASE)
    for number, classes in enumerate(TASKS.values()):
        tuned = dict(start)
        for name, tensor in start.items():
            if name in ("embed.weight", "hidden.weight", "norm.weight", "gate", *_MOVED[number]):
                noise = torch.randn(tensor.shape)
                tuned[name] = (tensor + 0.1 * noise.abs() ** 1.5 * noise.sign()).to(tensor.dtype)
        tuned["gate"] = (tuned["gate"] + torch.linspace(0.5, 0.7, 12)).to(torch.bfloat16)
        tuned["head.weight"], tuned["head.bias"] = torch.randn(classes, 13), torch.randn(classes)
        tuned["norm.num_batches_tracked"] = start["norm.num_batches_tracked"] + 7 * number
        save_file(tuned, FOLDER / "finetuned" / f"{number}.safetensors")


def make_emr() -> None:
    """Format version 1: a shared vector, masks, rescalers; private, exact and tied tensors."""
    compress(base(), finetuned(), EMR(), FOLDER / "emr.bundle", private=PRIVATE, frozen=FROZEN)


def make_lora() -> None:
    """Format version 2: adapters' own tensors, their start stored; factors in int8."""
    with TemporaryDirectory() as folder:
        paths = {task: Path(folder) / str(n) for n, task in enumerate(TASKS)}
        start: dict[str, Tensor] = {}
        for task, path in paths.items():
            config = peft.LoraConfig(
                r=2, lora_alpha=3, target_modules=["hidden"], modules_to_save=["head"]
            )
            model = peft.get_peft_model(Net(TASKS[task]), config)
            model.save_pretrained(path)
            state = load_file(path / "adapter_model.safetensors")
            if not start:
                start = {n: torch.randn(t.shape) for n, t in state.items() if ".lora_" in n}
            tuned = {n: start.get(n, 0) + 0.3 * torch.randn(t.shape) for n, t in state.items()}
            save_file(tuned, path / "adapter_model.safetensors")
            initial = {n.removeprefix("base_model.model."): t for n, t in start.items()}
            save_file(initial, path / "initial.safetensors")
            (path / "fusionkit.json").write_text('{"start": {"file": "initial.safetensors"}}')
        codec, out = SVD(rank=1, dtype="int8"), FOLDER / "lora.bundle"
        compress(base(), paths, codec, out, private=PRIVATE, adapters="modules")


def make_dbms() -> None:
    """Format version 3: positions, values in fp16 and int4, scalars; and how they were learned.

    The calibration's checkpoint is of a while before it ended as this bundle.
    """
    module = ReuseModule(
        base(),
        codec=DBMS(MagnitudePrune(0.2)),
        finetuned={task: str(path) for task, path in finetuned().items()},
        private=PRIVATE,
        frozen=FROZEN,
        calibration=Calibration(rows=ROWS, learning_rate=0.05),
    )
    save = Save(FOLDER / "calibrate.ckpt", CALIBRATION_KEPT)
    out = FOLDER / "dbms.bundle"
    calibrate(module, Rows(), out, trainer=trainer(CALIBRATION_EPOCHS, save))


def make_finetune() -> None:
    """A LoRA's checkpoint, and the adapter that it ended as."""
    module = Finetune(
        base(), "ant", "lora", private=PRIVATE, target_modules=["hidden"], rank=2, alpha=4,
        dropout=0.0, learning_rate=1e-2,
    )  # fmt: skip
    save = Save(FOLDER / "finetune.ckpt", FINETUNE_KEPT)
    trainer(FINETUNE_EPOCHS, save).fit(module, datamodule=Rows("ant"))
    with TemporaryDirectory() as folder:
        adapter = module.save(Path(folder) / "adapter") / "adapter_model.safetensors"
        shutil.copy(adapter, FOLDER / "finetune.safetensors")


_BASE = FOLDER / "base.safetensors"
_MOVED = [("hidden.bias", "norm.running_mean"), ("norm.running_mean",)]
"""What beside the weights moves of each task; the bias of the norm never does."""

if __name__ == "__main__":
    (FOLDER / "finetuned").mkdir(exist_ok=True)
    for old in ("emr", "lora", "dbms"):
        shutil.rmtree(FOLDER / f"{old}.bundle", ignore_errors=True)
    make_family()
    for make in (make_emr, make_lora, make_dbms, make_finetune):
        make()
