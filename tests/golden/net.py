"""The tiny base, its two tasks and their rows, of which the golden files are made.

It imports nothing of FusionKit's, so that the code of any commit can be run on it.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FOLDER = Path(__file__).parent
TASKS = {"ant": 2, "bee/2": 3}
"""Task → classes; one has a name that can't be a file's."""
PRIVATE, FROZEN = ["head.*"], ["place"]
ROWS = 16
"""Of each task: what it is fine-tuned and calibrated on."""


class Net(nn.Module):
    """A decoder tied to the embedding, BatchNorm, a gate in bfloat16, what is frozen, a head."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, 12))
        self.embed = nn.Embedding(13, 12)
        self.norm = nn.BatchNorm1d(12)
        self.gate = nn.Parameter(torch.ones(12, dtype=torch.bfloat16))
        self.hidden = nn.Linear(12, 12)
        self.decoder = nn.Linear(12, 13, bias=False)
        self.decoder.weight = self.embed.weight
        self.head = nn.Linear(13, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 `(B, L)` → logits `(B, classes)`."""
        x = self.norm((self.embed(tokens) + self.place).mean(1)) * self.gate
        logits: Tensor = self.head(self.decoder(self.hidden(x).relu()))
        return logits


def base() -> Net:
    """The base, in eval mode."""
    net, state = Net(), load_file(FOLDER / "base.safetensors")
    net.load_state_dict({**state, "decoder.weight": state["embed.weight"]})
    return net.eval()


def finetuned() -> dict[str, Path]:
    """The fine-tuned models' files."""
    return dict(zip(TASKS, sorted((FOLDER / "finetuned").iterdir()), strict=True))


class Rows(LightningDataModule):
    """Tokens, and labels of which some follow from them."""

    def __init__(self, *tasks: str) -> None:
        super().__init__()
        self.tasks = list(tasks or TASKS)
        self.num_classes = TASKS

    def train_dataloader(self) -> list[DataLoader[Any]]:
        """Each task's rows, in one order; batches of 8."""
        return [self._loader(task) for task in self.tasks]

    def _loader(self, task: str) -> DataLoader[Any]:
        count, length = torch.arange(ROWS)[:, None], torch.arange(4)[None]
        tokens = (count * 7 + length * (3 + count) + TASKS[task]) % 13
        return DataLoader(TensorDataset(tokens, tokens[:, 0] % TASKS[task]), batch_size=8)
