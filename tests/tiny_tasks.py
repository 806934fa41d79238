"""The tiny family's tasks: their rows, and what is calibrated and compared on them."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from tiny_net import TASKS, TinyNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fusionkit import DBMS, Calibration, MagnitudePrune
from fusionkit.calibration.pair_search import PROBES
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.kinds import kinds_of

PRIVATE = ["head.*"]
States = dict[str, dict[str, Tensor]]
EPOCHS = len(PROBES) + 5


class Data(LightningDataModule):
    """Random tokens and labels, of a different length for each task."""

    def __init__(self, tasks: tuple[str, ...] = TASKS) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.num_classes = {task: place + 2 for place, task in enumerate(TASKS)}

    def rows(self, task: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(len(task) + ord(task[0]))
        count = 20 + 7 * self.num_classes[task]
        tokens = torch.randint(0, 11, (count, 5), generator=generator)
        return tokens, torch.randint(0, self.num_classes[task], (count,), generator=generator)

    def test_dataloader(self) -> list[DataLoader[tuple[Tensor, ...]]]:
        return [DataLoader(TensorDataset(*self.rows(t)), batch_size=8) for t in self.tasks]

    val_dataloader = test_dataloader


class Rows(Data):
    """The tasks' rows, for training, too."""

    def train_dataloader(self) -> list[DataLoader[tuple[Tensor, ...]]]:
        return [DataLoader(TensorDataset(*self.rows(task)), batch_size=8) for task in self.tasks]


def trainer(epochs: int = EPOCHS, **options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(max_epochs=epochs, **{**quiet, **options})


def module(base: nn.Module, finetuned: States, codec: Any = None) -> ReuseModule:
    return ReuseModule(
        base,
        codec=codec or DBMS(MagnitudePrune(0.1)),
        finetuned=dict(finetuned),  # type: ignore[arg-type]
        private=PRIVATE,
    )


def settings(**own: Any) -> Calibration:
    """Of few rows."""
    return Calibration(**{"rows": 16, **own})


def opened(kind: Any, reuse: ReuseModule) -> Any:
    """A calibration as it is once the Trainer has set it up."""
    made = kind(reuse, settings(), reuse.codec)
    made.open(kinds_of(Rows(), list(TASKS)))
    return made


def rows_of(task: str, count: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The rows that are calibrated on."""
    tokens, labels = Data().rows(task)
    drawn = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:count]
    return tokens[drawn], labels[drawn]


def model_of(state: Mapping[str, Tensor]) -> TinyNet:
    model = TinyNet(state["head.weight"].shape[0]).eval()
    model.load_state_dict(dict(state))
    return model


def logits(state: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model_of(state)(tokens)


def kl(teacher: Tensor, student: Tensor) -> float:
    """KL(teacher ‖ student), a mean over the rows."""
    p = teacher.softmax(-1)
    return float((p * (p.log() - student.softmax(-1).log())).sum(-1).mean())
