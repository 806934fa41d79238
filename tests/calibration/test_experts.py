"""Calibration of a model whose experts are one stacked parameter, and whose embedding is tied."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_net import TASKS
from tiny_tasks import PRIVATE, Rows, rows_of, settings, trainer
from torch import Tensor, nn

from fusionkit import DBMS, SVD, Bundle, Merged, TaskArithmetic, calibrate
from fusionkit.codecs.base import DeltaCodec
from fusionkit.reuse.module import ReuseModule


class Mixture(nn.Module):
    """Two experts in a stack, both asked; what comes out is read by a tied head, too."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.experts = nn.Parameter(0.5 * torch.randn(2, 6, 6))
        self.read = nn.Linear(6, 11, bias=False)
        self.read.weight = self.embed.weight
        self.head = nn.Linear(11, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens).mean(1)
        mixed = torch.einsum("eoi,bi->bo", self.experts, hidden).tanh()
        return self.head(self.read(mixed))


def family() -> tuple[Mixture, dict[str, nn.Module]]:
    torch.manual_seed(0)
    base, tuned = Mixture(), {}
    for place, task in enumerate(TASKS):
        tuned[task] = copy.deepcopy(base)
        tuned[task].head = nn.Linear(11, place + 2)
        with torch.no_grad():
            for parameter in tuned[task].parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return base, tuned


@pytest.mark.parametrize(
    "codec",
    [DBMS(SVD(rank=1)), DBMS(SVD(rank=1), Merged(TaskArithmetic(0.3)))],
    ids=["mean shift", "merged shift"],
)
def test_the_two_scalars_are_learned_over_stacks(codec: DeltaCodec, tmp_path: Path) -> None:
    base, tuned = family()
    module = ReuseModule(
        base, codec=codec, finetuned={t: m.state_dict() for t, m in tuned.items()}, private=PRIVATE
    )
    calibrate(module, Rows(), tmp_path / "b", settings=settings(), trainer=trainer())
    bundle = Bundle(tmp_path / "b", family()[0])
    assert bundle.stacks == {"experts": 2}
    for task in TASKS:
        record = bundle.manifest.tasks[task].calibration
        assert record is not None
        assert record.loss_after < record.loss_before
        loss = _kl(tuned[task], bundle, task)
        assert record.loss_after == pytest.approx(loss, rel=1e-3)


@torch.no_grad()
def _kl(teacher: nn.Module, bundle: Bundle, task: str) -> float:
    """KL of the bundle's model from the fine-tuned one, over the rows of the calibration."""
    student = copy.deepcopy(teacher)
    student.load_state_dict(bundle.state_dict(task))
    tokens, _ = rows_of(task)
    found, wanted = (model(tokens).log_softmax(-1) for model in (student, teacher))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())
