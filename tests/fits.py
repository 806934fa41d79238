"""Tiny fine-tunes, made once for all tests: `pytest_plugins = ["fits"]` brings the fixtures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fusionkit.tasks.digits import DigitTasks, base_model
from fusionkit.tasks.finetune import Finetune
from fusionkit.tasks.only import only

TASKS = ("digit", "rotation", "parity")
TARGETS = ["qkv", "fc1"]
HEAD = ["head.*"]


class FewDigits(DigitTasks):
    """Some of the demo's tasks, few rows of each, and validation rows.

    Args:
        tasks: which.
        rows: training rows per task; half as many validate, and half as many test.
        batch_size: rows per batch.
    """

    def __init__(
        self, tasks: tuple[str, ...] = TASKS, rows: int = 64, batch_size: int = 16
    ) -> None:
        super().__init__(batch_size)
        self.tasks = list(tasks)
        self.num_classes = {task: self.num_classes[task] for task in tasks}
        self._count = rows

    def rows(self, task: str, test: bool) -> tuple[Tensor, Tensor]:
        """Rows drawn over all classes."""
        images, labels = super().rows(task, test)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        return images[order], labels[order]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [self._part(task, False, slice(-self._count // 2, None)) for task in self.tasks]

    def _loader(self, task: str, test: bool, shuffle: bool = False) -> DataLoader[Any]:
        return self._part(task, test, slice(self._count // (1 + test)), shuffle)

    def _part(self, task: str, test: bool, part: slice, shuffle: bool = False) -> DataLoader[Any]:
        images, labels = self.rows(task, test)
        dataset = TensorDataset(images[part], labels[part])
        return DataLoader(dataset, self.batch_size, shuffle=shuffle)


def tiny_vit() -> nn.Module:
    """The demo's base, with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return base_model().eval()


def trainer(steps: int, **options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, **{**quiet, **options}
    )


def finetune(
    task: str = "digit", method: str = "lora", steps: int = 4, **settings: Any
) -> Finetune:
    """A tiny ViT, fine-tuned for a few steps; in eval mode."""
    own = {"learning_rate": 2e-2} if method != "full" else {"learning_rate": 1e-3}
    if method != "full":
        own |= {"target_modules": TARGETS, "rank": 4, "alpha": 8, "dropout": 0.0}
    if method == "ia3":
        own |= {"feedforward_modules": ["fc1"]}
    torch.manual_seed(1)
    module = Finetune(
        tiny_vit(), task, method, **{"private": HEAD, "warmup": 0.0, **own, **settings}
    )
    trainer(steps).fit(module, datamodule=only(FewDigits(), [task]))
    return module.eval()


@dataclass(frozen=True)
class Fits:
    """One method's fine-tunes, by task."""

    modules: dict[str, Finetune]
    paths: dict[str, Path]


@pytest.fixture(scope="session")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of all fits, as a file."""
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(tiny_vit().state_dict(), path)
    return path


def _fits(method: str, folder: Path, **settings: Any) -> Fits:
    modules = {task: finetune(task, method, **settings) for task in TASKS}
    paths = {task: module.save(folder / task) for task, module in modules.items()}
    return Fits(modules, paths)


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Fits:
    return _fits("lora", tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="session")
def linearized(tmp_path_factory: pytest.TempPathFactory) -> Fits:
    return _fits("linearized_lora", tmp_path_factory.mktemp("linearized"))


@pytest.fixture(scope="session")
def ia3(tmp_path_factory: pytest.TempPathFactory) -> Fits:
    return _fits("ia3", tmp_path_factory.mktemp("ia3"))


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Fits:
    frozen = ["patch_embed.*", "pos_embed", "blocks.0.norm*"]
    return _fits("full", tmp_path_factory.mktemp("full"), frozen=frozen)


def images(task: str = "digit", count: int = 32) -> Tensor:
    """Test images float32 `(count, 1, 8, 8)`."""
    return FewDigits().rows(task, test=True)[0][:count]


def outputs(model: nn.Module, task: str = "digit") -> Tensor:
    """Logits of a model in eval mode."""
    with torch.no_grad():
        found: Tensor = model.eval()(images(task))
    return found
