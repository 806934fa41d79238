"""Images for classification."""

import zipfile
import zlib
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fusionkit.errors import DataError
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.data import Split, TaskData


class ImageArrays(TaskData):
    """Images from NumPy archives with `x_train`, `y_train`, `x_test`, `y_test`, all uint8.

    Batches are `(x, y)`: float32 `(B, C, H, W)`, normalised, and int64 `(B,)`.

    Args:
        tasks: task name → `.npz` file; grey `(N, H, W)` or colour `(N, H, W, 3)`.
        batch_size: rows per batch.
        image_size: height and width to resize to (bilinear, antialiased); as they are by default.
        channels: 3 repeats grey images; 1 averages colour ones; as they are by default.
        mean: taken off the values, which are scaled to [0, 1] first.
        std: what they are then divided by.
        val_fraction: share of the training rows kept for validation, in [0, 1).
        limit: at most so many rows per task and split; all by default.
        num_workers: loading processes per dataloader.
        seed: of the draws.

    Attributes:
        num_classes: task name → number of classes.

    Raises:
        DataError: a file is missing or is not such an archive.
    """

    def __init__(
        self,
        tasks: dict[str, str],
        batch_size: int = 128,
        image_size: int | None = None,
        channels: Literal[1, 3] | None = None,
        mean: float = 0.5,
        std: float = 0.5,
        val_fraction: float = 0.1,
        limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(tasks, batch_size, val_fraction, limit, num_workers, seed)
        self.image_size = image_size
        self.channels = channels
        self.mean = mean
        self.std = std
        self.num_classes = {
            task: 1 + max(int(self._array(task, f"y_{split}").max()) for split in ("train", "test"))
            for task in self.tasks
        }
        self.kinds = {task: Classification(count) for task, count in self.num_classes.items()}

    def read(self, task: str, split: Split) -> TensorDataset:
        """The images stay uint8 in memory; a batch is normalised as it is made."""
        images = torch.from_numpy(self._array(task, f"x_{split}"))
        images = images[:, None] if images.ndim == 3 else images.movedim(-1, 1)
        labels = torch.from_numpy(self._array(task, f"y_{split}")).to(torch.int64)
        if len(images) != len(labels):
            raise DataError(
                f"{self.paths[task]}: 'x_{split}' has {len(images)} rows, 'y_{split}' {len(labels)}"
            )
        return TensorDataset(images, labels)

    def collate(self, rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Scale, fit channels and size, normalise."""
        images = torch.stack([image for image, _ in rows]).to(torch.float32) / 255
        if self.channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        elif self.channels == 1 and images.shape[1] == 3:
            images = images.mean(1, keepdim=True)
        if self.image_size is not None and images.shape[-2:] != (self.image_size,) * 2:
            images = torch.nn.functional.interpolate(
                images, (self.image_size, self.image_size), mode="bilinear", antialias=True
            )
        return (images - self.mean) / self.std, torch.stack([label for _, label in rows])

    def _array(self, task: str, name: str) -> np.ndarray[Any, Any]:
        path = self.paths[task]
        try:
            # Opened as a zip first: np.load takes other files too, and returns other types.
            with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as arrays:
                array: np.ndarray[Any, Any] = arrays[name]
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file (task '{task}'); check the path") from error
        except KeyError as error:
            raise DataError(f"{path}: has no array '{name}' (task '{task}')") from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path}: not a readable .npz archive ({error})") from error
        image = array.ndim == 3 or (array.ndim == 4 and array.shape[-1] == 3)
        fits = image if name.startswith("x_") else array.ndim == 1
        if array.dtype != np.uint8 or not fits or not len(array):
            expected = "(N, H, W) or (N, H, W, 3)" if name.startswith("x_") else "(N,)"
            raise DataError(
                f"{path}: '{name}' is {array.dtype} of shape {array.shape}; expected uint8 "
                f"{expected}, N at least 1"
            )
        return array
