"""Tasks of so many rows each, for evaluation over several processes."""

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class Data(LightningDataModule):
    """Random tokens and labels; so many rows of each task."""

    def __init__(self, counts: dict[str, int]) -> None:
        super().__init__()
        self.counts = counts
        self.tasks = list(counts)
        self.num_classes = {task: place + 2 for place, task in enumerate(counts)}

    def test_dataloader(self) -> list[DataLoader[tuple[Tensor, ...]]]:
        loaders = []
        for place, (task, count) in enumerate(self.counts.items()):
            generator = torch.Generator().manual_seed(place)
            tokens = torch.randint(0, 11, (count, 5), generator=generator)
            labels = torch.randint(0, self.num_classes[task], (count,), generator=generator)
            loaders.append(DataLoader(TensorDataset(tokens, labels), batch_size=4))
        return loaders

    val_dataloader = test_dataloader
