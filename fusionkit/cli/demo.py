"""The embedded demo: a family of small vision models, made on the spot from real images.

The images come with scikit-learn: 1,797 handwritten digits of 8 × 8 pixels, and two photographs,
cut into patches of that size. A small ViT is pre-trained on the digits, then fine-tuned for each
task, once in full and once by a LoRA. Every fifth digit, and the right third of each photograph,
is for testing, and never seen in any training, the base's included.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fusionkit.cli import report
from fusionkit.tasks.finetune import WEIGHTS, Finetune

SETTINGS: dict[str, Any] = {
    "version": 3,
    "model": {"embed_dim": 64, "depth": 4, "num_heads": 4},
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

Rows = tuple[Tensor, Tensor]
"""Images float32 `(N, 1, 8, 8)` in [-1, 1], labels int64 `(N,)`."""

TEST_EVERY = 5
"""Every fifth digit is for testing."""

_PATCH = 8


def base_model() -> nn.Module:
    """The base: a ViT of 8 × 8 grey images in patches of 2 × 2, with a head of 10 classes."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=_PATCH,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        **SETTINGS["model"],
    )


class DigitTasks(LightningDataModule):
    """The demo's tasks, one dataloader each.

    - `digit`: which digit.
    - `negative`: which digit, light and dark exchanged.
    - `mirror`: which digit, in mirror writing, turned upside down.
    - `rotation`: by which multiple of 90° a digit is turned (4 classes).
    - `parity`: whether a digit, lying on its side, is odd (2 classes).
    - `photo`: from which of two photographs a patch is (2 classes).

    Batches are `(x, y)`: float32 `(B, 1, 8, 8)` and int64 `(B,)`.

    Args:
        batch_size: rows per batch.

    Attributes:
        tasks: the tasks' names, in the order of the dataloaders.
        num_classes: task name → number of classes.
    """

    def __init__(self, batch_size: int = 256) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.tasks = list(_TASKS)
        self.num_classes = {task: classes for task, (classes, _) in _TASKS.items()}

    def rows(self, task: str, test: bool) -> Rows:
        """All rows of one split of a task."""
        return _TASKS[task][1](test)

    def train_dataloader(self) -> list[DataLoader[Any]]:
        """Training rows, shuffled: one dataloader per task."""
        return [self._loader(task, test=False, shuffle=True) for task in self.tasks]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Test rows: one dataloader per task."""
        return [self._loader(task, test=True) for task in self.tasks]

    def _loader(self, task: str, test: bool, shuffle: bool = False) -> DataLoader[Any]:
        dataset = TensorDataset(*self.rows(task, test))
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle)


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
    base = _trained("base", "base", _pretraining_rows(), 10, place)
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
    if path.exists():
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


@cache
def _digits(test: bool) -> Rows:
    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % TEST_EVERY == 0) == test
    images = torch.from_numpy(digits.images[chosen]).to(torch.float32)[:, None] / 8 - 1
    return images, torch.from_numpy(digits.target[chosen]).to(torch.int64)


def _pretraining_rows() -> Rows:
    """Training digits turned, mirrored and inverted every way: the base knows strokes, no task."""
    images, labels = _digits(test=False)
    turned = [torch.rot90(images, turns, (2, 3)) for turns in range(4)]
    seen = torch.cat([*turned, *(image.flip(3) for image in turned)])
    return torch.cat([seen, -seen]), labels.repeat(16)


def _digit(test: bool) -> Rows:
    return _digits(test)


def _negative(test: bool) -> Rows:
    images, labels = _digits(test)
    return -images, labels


def _mirror(test: bool) -> Rows:
    images, labels = _digits(test)
    return images.flip(2, 3).flip(3), labels


def _rotation(test: bool) -> Rows:
    images, _ = _digits(test)
    turned = torch.cat([torch.rot90(images, turns, (2, 3)) for turns in range(4)])
    return turned, torch.arange(4).repeat_interleave(len(images))


def _parity(test: bool) -> Rows:
    images, labels = _digits(test)
    return torch.rot90(images, 1, (2, 3)), labels % 2


def _photo(test: bool) -> Rows:
    patches, labels = [], []
    for label, photo in enumerate(load_sample_images().images):
        grey = torch.from_numpy(photo.copy()).to(torch.float32).mean(-1) / 127.5 - 1
        edge = grey.shape[1] * 2 // 3 // _PATCH * _PATCH
        side = grey[:, edge:] if test else grey[:, :edge]
        tiles = side.unfold(0, _PATCH, _PATCH).unfold(1, _PATCH, _PATCH).reshape(-1, 1, 8, 8)
        patches.append(tiles)
        labels.append(torch.full((len(tiles),), label))
    return torch.cat(patches), torch.cat(labels)


_TASKS: dict[str, tuple[int, Callable[[bool], Rows]]] = {
    "digit": (10, _digit),
    "negative": (10, _negative),
    "mirror": (10, _mirror),
    "rotation": (4, _rotation),
    "parity": (2, _parity),
    "photo": (2, _photo),
}
