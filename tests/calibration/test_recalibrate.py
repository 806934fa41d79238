"""BatchNorm after a merge: a warning, and statistics of the merged weights; PyTorch judges."""

import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_resnet import resnet
from tiny_tasks import trainer
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import fusionkit
from fusionkit import SVD, Bundle, Mean, ReuseModule
from fusionkit.calibration.recalibrate import has_statistics
from fusionkit.cli import main as cli
from fusionkit.codecs.merged import Merged
from fusionkit.errors import FusionKitError
from fusionkit.tasks.images import ImageArrays

pytest.importorskip("timm", reason="pip install .[test]")
TASKS = ("bright", "wide")
SIZE = 16


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ResNet and two models far from it, whose tasks are what they say of their images."""
    folder = tmp_path_factory.mktemp("resnet")
    save_file(resnet().state_dict(), folder / "base.safetensors")
    for seed, task in enumerate(TASKS):
        model = resnet().train()
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.05 * value.std().nan_to_num(0.1) * torch.randn(value.shape))
                value.mul_((4.0, 0.25)[seed] if value.ndim == 4 else 1.0)  # as BatchNorm undoes
        arrays = {
            f"x_{split}": torch.randint(0, 256, (96, SIZE, SIZE), dtype=torch.uint8).numpy()
            for split in ("train", "test")
        }
        arrays |= {f"y_{split}": np.arange(96, dtype="uint8") % 2 for split in ("train", "test")}
        np.savez(folder / f"{task}.npz", **arrays)
        rows = ImageArrays({task: str(folder / f"{task}.npz")}, batch_size=32, val_fraction=0)
        update_bn(rows.train_dataloader()[0], model)
        model.eval()
        (images,) = (torch.cat([x for x, _ in rows.test_dataloader()[0]]),)
        with torch.no_grad():
            model.fc.bias -= model(images).median(0).values
            arrays["y_test"] = model(images).argmax(-1).to(torch.uint8).numpy()
        assert 20 < arrays["y_test"].sum() < 76
        np.savez(folder / f"{task}.npz", **arrays)
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(state, folder / f"{task}.safetensors")
    return folder


def data(folder: Path) -> ImageArrays:
    return ImageArrays({task: str(folder / f"{task}.npz") for task in TASKS}, batch_size=32)


def module(folder: Path) -> ReuseModule:
    finetuned: Any = {task: str(folder / f"{task}.safetensors") for task in TASKS}
    return ReuseModule(
        resnet(), base=str(folder / "base.safetensors"), finetuned=finetuned, private=["fc.*"]
    )


def score(reuse: ReuseModule, folder: Path) -> float:
    trainer().test(reuse, data(folder), verbose=False)
    assert reuse.scores is not None
    return reuse.scores.mean


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "running_" in n}


def test_each_task_keeps_its_own(trained: Path, tmp_path: Path) -> None:
    own = module(trained)
    own.compress(tmp_path / "bundle", codec=SVD(rank=2))
    own.reuse(Bundle(tmp_path / "bundle", str(trained / "base.safetensors")))
    for task in TASKS:
        own.switch(task)
        tuned = fusionkit.Checkpoint(str(trained / f"{task}.safetensors"))
        assert all(torch.equal(tuned[name], value) for name, value in statistics(own.model).items())


def test_statistics_of_the_merged_weights(trained: Path, tmp_path: Path) -> None:
    """As `update_bn` has them of the same rows; and the merge then does what it can."""
    own, rows = module(trained), data(trained)
    codec = Merged(Mean(), dtype="fp32")
    own.reuse(own.compress(codec=codec))
    stale = score(own, trained)
    bundle = fusionkit.recalibrate(own, rows, tmp_path / "bundle", codec=codec, rows=64)
    mended = score(own, trained)
    assert mended > stale + 0.1
    again = module(trained)
    again.reuse(Bundle(tmp_path / "bundle", str(trained / "base.safetensors")))
    assert score(again, trained) == pytest.approx(mended)
    assert bundle.nbytes == again.source.nbytes  # type: ignore[union-attr]
    for task, loader in rows.calibration_dataloaders(64, 0).items():
        own.reuse(own.compress(codec=codec))
        own.switch(task)
        own.model.train()
        update_bn(loader, own.model)
        wanted = statistics(own.model.eval())
        again.switch(task)
        for name, value in statistics(again.model).items():
            torch.testing.assert_close(value, wanted[name])


def test_compared(trained: Path, tmp_path: Path) -> None:
    """A recipe's merge is warned of, and mended by `recalibrate: true`."""
    content = {
        "model": {
            "model": {"class_path": "tiny_resnet.resnet"},
            "base": str(trained / "base.safetensors"),
            "finetuned": {task: str(trained / f"{task}.safetensors") for task in TASKS},
            "private": "fc.*",
        },
        "codecs": {"mean merge": {"class_path": "Merged"}},
        "calibration": {"rows": 64},
        "data": {
            "class_path": "ImageArrays",
            "init_args": {"tasks": {task: str(trained / f"{task}.npz") for task in TASKS}},
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        "out": str(tmp_path / "out"),
    }
    recipe = tmp_path / "recipe.yaml"
    found = []
    for own in ({}, {"recalibrate": True}):
        recipe.write_text(yaml.safe_dump({**content, **own}))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            cli.main(["compare", "--config", str(recipe)])
        stale = [str(each.message) for each in told if "has BatchNorm" in str(each.message)]
        assert len(stale) == (0 if own else 1)
        rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
        found.append({row["name"]: float(row["mean_score"]) for row in rows})
    before, after = found
    assert after["mean merge"] > before["mean merge"] + 0.1
    assert after["fine-tuned"] == before["fine-tuned"]


def test_nothing_to_estimate(trained: Path) -> None:
    plain = nn.Linear(2, 2)
    assert not has_statistics(plain)
    assert has_statistics(resnet())
    own = ReuseModule(plain, finetuned={"a": dict(plain.state_dict())})  # type: ignore[dict-item]
    with pytest.raises(FusionKitError, match="Linear has no running statistics"):
        fusionkit.recalibrate(own, data(trained), codec=SVD(rank=1))
