"""Two tasks of the tiny net, one of each kind."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from tiny_net import TinyNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fusionkit import ReuseModule
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.regression import Regression
from fusionkit.tasks.task import Task

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
KINDS: dict[str, Task] = {"colour": Classification(3), "size": Regression()}


class Mixed(LightningDataModule):
    """A task of three classes, and one of a number per row; one batch has a repeated input."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks = list(KINDS)
        self.kinds = KINDS
        self.asked: list[str] = []

    def rows(self, task: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(len(task))
        tokens = torch.randint(0, 11, (24, 5), generator=generator)
        if task == "colour":
            return tokens, tokens[:, 0] % 3
        return tokens, tokens.to(torch.float32).mean(1)

    def train_dataloader(self) -> list[DataLoader[Any]]:
        return self._loaders("train")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self._loaders("test")

    def _loaders(self, split: str) -> list[DataLoader[Any]]:
        self.asked.append(split)
        return [DataLoader(TensorDataset(*self.rows(task)), 7) for task in self.tasks]


def fine_tuned(base: TinyNet) -> dict[str, dict[str, Tensor]]:
    """A fine-tune of each kind; the head of the one has a single output."""
    found = {}
    for seed, (task, kind) in enumerate(KINDS.items()):
        model = TinyNet(kind.head_size or 0)
        generator = torch.Generator().manual_seed(seed)
        state = {
            name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point() and not name.startswith(("head", "norm.running"))
            else tensor
            for name, tensor in base.state_dict().items()
        }
        state["decoder.weight"] = state["embed.weight"]
        state["head.weight"] = torch.randn(model.head.weight.shape, generator=generator)
        state["head.bias"] = torch.randn(model.head.bias.shape, generator=generator)
        found[task] = state
    return found


def outputs(base: nn.Module, state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    model = TinyNet(state["head.weight"].shape[0]).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(tokens)


def module(base: nn.Module, tuned: Any, **settings: Any) -> ReuseModule:
    return ReuseModule(base, finetuned=dict(tuned), private=["head.*"], **settings)
