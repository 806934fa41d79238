"""Tasks joined into one: which rows, which classes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fusionkit.errors import DataError
from fusionkit.tasks.images import ImageArrays
from fusionkit.tasks.joined import Joined
from fusionkit.tasks.regression import Regression


@pytest.fixture
def images(tmp_path: Path) -> ImageArrays:
    """Two tasks, of 3 and 2 classes; each image is as grey as its task and its class say."""
    for place, (task, classes) in enumerate({"three": 3, "two": 2}.items()):
        arrays = {}
        for split, rows in (("train", 20), ("test", 7)):
            labels = np.arange(rows, dtype="uint8") % classes
            grey = (100 * place + 10 * labels)[:, None, None]
            arrays |= {f"y_{split}": labels, f"x_{split}": np.tile(grey, (1, 4, 4))}
        np.savez(tmp_path / f"{task}.npz", **arrays)
    tasks = {task: str(tmp_path / f"{task}.npz") for task in ("three", "two")}
    return ImageArrays(tasks, batch_size=64, val_fraction=0.25, mean=0, std=1)


def seen(data: Joined, loader: str) -> set[tuple[int, int]]:
    (batches,) = getattr(data, loader)()
    ((x, y),) = list(batches)
    assert x.shape[1:] == (1, 4, 4)
    grey = (255 * x[:, 0, 0, 0]).round().to(torch.int64)
    return set(zip(grey.tolist(), y.tolist(), strict=True))


def test_the_classes_follow_one_another(images: ImageArrays) -> None:
    data = Joined(images)
    assert data.tasks == ["joined"]
    assert data.num_classes == {"joined": 5}
    whole = {(0, 0), (10, 1), (20, 2), (100, 3), (110, 4)}
    assert seen(data, "test_dataloader") == seen(data, "train_dataloader") == whole
    sizes = [
        len(loaders[0].dataset) for loaders in (data.train_dataloader(), data.val_dataloader())
    ]
    assert sizes == [30, 10]


def test_the_first_classes_of_each(images: ImageArrays) -> None:
    data = Joined(images, classes=2, name="base", limit=9)
    assert data.num_classes == {"base": 4}
    assert seen(data, "test_dataloader") <= {(0, 0), (10, 1), (100, 2), (110, 3)}
    (train,) = data.train_dataloader()
    assert len(train.dataset) == 9
    assert len(data.read("base", "test")) == 5 + 7  # of seven rows of three classes, five


@pytest.mark.parametrize("classes", [0, 3])
def test_more_classes_than_a_task_has(images: ImageArrays, classes: int) -> None:
    with pytest.raises(DataError, match=rf"from 1 to [23], as '\w+' has, got {classes}"):
        Joined(images, classes=classes)


def test_tasks_that_have_no_classes(images: ImageArrays) -> None:
    images.kinds["two"] = Regression()
    with pytest.raises(DataError, match="expected tasks of classes to join, and 'two' is of Regr"):
        Joined(images)
