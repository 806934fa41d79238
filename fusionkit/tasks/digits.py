"""The demo's tasks: real images that come with scikit-learn.

1,797 handwritten digits of 8 × 8 pixels, and two photographs, cut into patches of that size. Every
fifth digit, and the right third of each photograph, is for testing, and never seen in any training.
"""

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fusionkit.errors import of_extra

Rows = tuple[Tensor, Tensor]
"""Images float32 `(N, 1, 8, 8)` in [-1, 1], labels int64 `(N,)`."""
Grey = tuple[Tensor, Tensor]
"""Images uint8 `(N, 8, 8)`, labels int64 `(N,)`."""

SIZES: dict[str, Any] = {"embed_dim": 64, "depth": 4, "num_heads": 4}
"""Of the base."""
TEST_EVERY = 5
"""Every fifth digit is for testing."""
CLASSES = 10
"""Of its head."""
_PATCH = 8


def base_model() -> nn.Module:
    """The base: a ViT of 8 × 8 grey images in patches of 2 × 2, with a head of 10 classes."""
    timm = of_extra("timm", "demo", "the demo's model")
    config = model_config(CLASSES)
    settings = config["model_args"]
    made: nn.Module = timm.create_model(config["architecture"], num_classes=CLASSES, **settings)
    return made


def model_config(classes: int) -> dict[str, Any]:
    """What a folder's `config.json` says of such a model, in timm's own terms.

    Args:
        classes: of its head.
    """
    return {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": classes,
        "model_args": {"img_size": _PATCH, "patch_size": 2, "in_chans": 1, **SIZES},
        "pretrained_cfg": {"input_size": [1, _PATCH, _PATCH], "mean": [0.5], "std": [0.5]},
    }


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
        return _as_floats(_TASKS[task][1](test))

    def archive(self, task: str) -> bytes:
        """All rows of a task as a `.npz` file, which `ImageArrays` reads."""
        arrays: dict[str, Any] = {}
        for split in ("train", "test"):
            images, labels = _TASKS[task][1](split == "test")
            arrays[f"x_{split}"] = images.numpy()
            arrays[f"y_{split}"] = labels.to(torch.uint8).numpy()
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()

    def train_dataloader(self) -> list[DataLoader[Any]]:
        """Training rows, shuffled: one dataloader per task."""
        return [self._loader(task, test=False, shuffle=True) for task in self.tasks]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Test rows: one dataloader per task."""
        return [self._loader(task, test=True) for task in self.tasks]

    def _loader(self, task: str, test: bool, shuffle: bool = False) -> DataLoader[Any]:
        dataset = TensorDataset(*self.rows(task, test))
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle)


def _as_floats(grey: Grey) -> Rows:
    images, labels = grey
    return (2 * images[:, None].to(torch.float32) - 255) / 255, labels


def _sklearn() -> Any:
    return of_extra("sklearn.datasets", "demo", "the demo's images")


@cache
def _digits(test: bool) -> Grey:
    digits = _sklearn().load_digits()
    chosen = (np.arange(len(digits.target)) % TEST_EVERY == 0) == test
    images = torch.from_numpy(digits.images[chosen]) * (255 / 16)
    return images.round().to(torch.uint8), torch.from_numpy(digits.target[chosen]).to(torch.int64)


def pretraining_rows() -> Rows:
    """Training digits turned, mirrored and inverted every way: the base knows strokes, no task."""
    images, labels = _digits(test=False)
    turned = [torch.rot90(images, turns, (1, 2)) for turns in range(4)]
    seen = torch.cat([*turned, *(image.flip(2) for image in turned)])
    return _as_floats((torch.cat([seen, 255 - seen]), labels.repeat(16)))


def _digit(test: bool) -> Grey:
    return _digits(test)


def _negative(test: bool) -> Grey:
    images, labels = _digits(test)
    return 255 - images, labels


def _mirror(test: bool) -> Grey:
    images, labels = _digits(test)
    return images.flip(1, 2).flip(2), labels


def _rotation(test: bool) -> Grey:
    images, _ = _digits(test)
    turned = torch.cat([torch.rot90(images, turns, (1, 2)) for turns in range(4)])
    return turned, torch.arange(4).repeat_interleave(len(images))


def _parity(test: bool) -> Grey:
    images, labels = _digits(test)
    return torch.rot90(images, 1, (1, 2)), labels % 2


def _photo(test: bool) -> Grey:
    patches, labels = [], []
    for label, photo in enumerate(_sklearn().load_sample_images().images):
        grey = torch.from_numpy(photo.copy()).to(torch.float32).mean(-1).round().to(torch.uint8)
        edge = grey.shape[1] * 2 // 3 // _PATCH * _PATCH
        side = grey[:, edge:] if test else grey[:, :edge]
        tiles = side.unfold(0, _PATCH, _PATCH).unfold(1, _PATCH, _PATCH)
        patches.append(tiles.reshape(-1, _PATCH, _PATCH))
        labels.append(torch.full((len(patches[-1]),), label))
    return torch.cat(patches), torch.cat(labels)


_TASKS: dict[str, tuple[int, Callable[[bool], Grey]]] = {
    "digit": (10, _digit),
    "negative": (10, _negative),
    "mirror": (10, _mirror),
    "rotation": (4, _rotation),
    "parity": (2, _parity),
    "photo": (2, _photo),
}
