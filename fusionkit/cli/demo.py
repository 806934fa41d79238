"""The embedded demo: a family of small vision models, made on the spot from real images.

Their tasks are those of `fusionkit.tasks.digits`. A small ViT is pre-trained on the digits, then
fine-tuned for each task, once in full and once by a LoRA. No training, the base's included, ever
sees a test row.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from fusionkit.checkpoints.paths import is_there
from fusionkit.cli import compare, report
from fusionkit.cli.arguments import call
from fusionkit.cli.recipe import quieten, recipes_folder
from fusionkit.tasks.digits import (
    CLASSES,
    SIZES,
    DigitTasks,
    Rows,
    base_model,
    model_config,
    pretraining_rows,
)
from fusionkit.tasks.finetune import WEIGHTS, Finetune

SETTINGS: dict[str, Any] = {
    "version": 4,
    "model": SIZES,
    "base": {"steps": 1200, "method": "full", "learning_rate": 2e-3},
    "full": {"steps": 300, "method": "full", "learning_rate": 4e-4},
    "lora": {
        "steps": 200,
        "method": "lora",
        "learning_rate": 5e-3,
        "rank": 8,
        "alpha": 16,
        "target_modules": ["qkv", "proj", "fc1", "fc2"],
    },
    "batch_size": 64,
}
"""How the family is trained; part of the cache's key."""


@dataclass(frozen=True)
class DemoFamily:
    """Paths of the demo's checkpoints.

    Attributes:
        base: the base's.
        full: task name → full fine-tune.
        lora: task name → LoRA adapter.
    """

    base: Path
    full: dict[str, Path]
    lora: dict[str, Path]


def prepare(folder: Path) -> DemoFamily:
    """Train the family, or find it trained: each checkpoint appears whole or not at all.

    Args:
        folder: the cache; families of other settings may be in it too.

    Returns:
        the checkpoints' paths.
    """
    key = hashlib.sha256(json.dumps(SETTINGS, sort_keys=True).encode()).hexdigest()[:12]
    place = folder / key
    data = DigitTasks(SETTINGS["batch_size"])
    base = _trained("base", "base", pretraining_rows(), 10, place)
    families = {
        kind: {
            task: _trained(task, kind, data.rows(task, test=False), classes, place, base)
            for task, classes in data.num_classes.items()
        }
        for kind in ("full", "lora")
    }
    return DemoFamily(base, **families)


class _OneTask(LightningDataModule):
    """The training rows of one task."""

    def __init__(self, task: str, rows: Rows, classes: int) -> None:
        super().__init__()
        self.tasks, self.num_classes, self._rows = [task], {task: classes}, rows

    def train_dataloader(self) -> list[DataLoader[Any]]:
        dataset = TensorDataset(*self._rows)
        return [DataLoader(dataset, SETTINGS["batch_size"], shuffle=True, drop_last=True)]


def _trained(
    name: str, kind: str, rows: Rows, classes: int, place: Path, base: Path | None = None
) -> Path:
    """A fine-tuned checkpoint's path; trained first, if it is not there."""
    settings = dict(SETTINGS[kind])
    folder = place / kind / name
    path = folder / WEIGHTS if settings["method"] == "full" else folder
    if is_there(path):
        return path
    steps = settings.pop("steps")
    report.show(f"training '{name}' ({kind}): {steps} steps over {len(rows[1]):,} images")
    seed_everything(0, verbose=False)  # before the model is built: it is drawn too
    module = Finetune(
        base_model(),
        base=str(base) if base else None,
        private=["head.*"],
        dropout=0.0,
        warmup=0.3,
        **settings,
    )
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=_OneTask(name, rows, classes))
    return module.save(folder)


def lay_out(family: DemoFamily, out: Path) -> None:
    """Write a family and its tasks' rows where one looks for them, as one keeps one's own.

    Args:
        family: the checkpoints.
        out: folder for `models/base`, `models/full/TASK`, `models/lora/TASK` and
            `data/TASK.npz`; files that are there and as they would be are left alone.
    """
    data = DigitTasks()
    models = out / "models"
    folders: dict[str, tuple[Path, dict[str, Any] | None]] = {
        "base": (family.base.parent, model_config(CLASSES))
    }
    for task, classes in data.num_classes.items():
        folders[f"full/{task}"] = (family.full[task].parent, model_config(classes))
        folders[f"lora/{task}"] = (family.lora[task], None)
        report.replace_file(out / "data" / f"{task}.npz", data.archive(task))
    for place, (folder, config) in folders.items():
        for path in folder.iterdir():
            report.replace_file(models / place / path.name, path.read_bytes())
        if config is not None:
            report.replace_file(models / place / "config.json", json.dumps(config).encode())


def run(args: list[str]) -> None:
    """The whole way on a small family of vision models."""
    call(demo, args)


def demo(out: str = "out/demo", cache: str | None = None) -> None:
    """The whole way on a small family of vision models: train, compress, compare, plot.

    Args:
        out: folder for models, data, tables, scores and plots.
        cache: folder that keeps the trained models; by default the user's cache folder.
    """
    quieten()
    # Such small matrices gain nothing from more threads, and a busy machine stalls.
    torch.set_num_threads(1)
    own = Path.home() / ".cache" / "fusionkit" / "demo"
    results = report.local_folder(out)
    lay_out(prepare(report.local_folder(cache) if cache else own), results)
    report.show(f"models: {results / 'models'}; their tasks' images: {results / 'data'}")
    for name, kind, place in (("demo", "full", results), ("demo_lora", "lora", results / "lora")):
        compare.run(
            [
                f"--config={recipes_folder() / name}.yaml",
                f"--model.base={results / 'models/base'}",
                f"--model.finetuned={results / 'models' / kind / '*'}",
                f"--out={place}",
            ]
        )
