"""Calibration of tasks that added rows to the vocabulary, on rows with the tokens that came so."""

from typing import Any

import pytest
import torch
from tiny_net import TASKS, TESTS, TinyNet
from tiny_tasks import PRIVATE, Rows, settings, trainer
from torch import Tensor, nn

from fusionkit import DBMS, DeltaCodec, Dense, MagnitudePrune, calibrate
from fusionkit.calibration.dbms import DBMSCalibration
from fusionkit.registry import load
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.kinds import kinds_of

States = dict[str, dict[str, Tensor]]


class NewTokens(Rows):
    """Rows of which some tokens are beyond the base's 11."""

    def rows(self, task: str) -> tuple[Tensor, Tensor]:
        tokens, labels = super().rows(task)
        return tokens + 2, labels


@pytest.fixture
def longer(finetuned: States) -> States:
    """Fine-tuned models with two tokens more; their heads take two more inputs."""
    for task, state in finetuned.items():
        state["embed.weight"] = torch.cat([state["embed.weight"], torch.randn(2, 6)])
        state["decoder.weight"] = state["embed.weight"]
        state["head.weight"] = torch.randn(TASKS.index(task) + 2, 13)
    return finetuned


def module(base: nn.Module, finetuned: States, codec: DeltaCodec) -> ReuseModule:
    own: Any = finetuned
    return ReuseModule(base, codec=codec, finetuned=own, private=PRIVATE)


def test_weights_that_are_formed_have_them(base: TinyNet, longer: States) -> None:
    """With α = 0 and nothing lost, the model is the fine-tuned one: no divergence is left."""
    reuse = module(base, longer, DBMS(Dense("fp32")))
    calibrator = DBMSCalibration(reuse, settings(), reuse.codec)  # type: ignore[arg-type]
    calibrator.open(kinds_of(NewTokens(), list(TASKS)))
    pair = (0.0, 1.0)
    calibrator.encode([pair] * len(TASKS))
    for place, task in enumerate(TASKS):
        loss = calibrator.loss_of(place, torch.tensor(pair), NewTokens().rows(task), 0)
        assert float(loss) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dbms", "learned parts"])
def test_calibrated_tasks_keep_them(
    kind: str, base: TinyNet, longer: States, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(TESTS / "plugin")
    ternary: Any = load("fusionkit.codecs", "ternary")
    reuse = module(base, longer, ternary(0.3) if kind != "dbms" else DBMS(MagnitudePrune(0.3)))
    bundle = calibrate(reuse, NewTokens(), settings=settings(), trainer=trainer(2))
    for task in TASKS:
        assert bundle.added(task) == {"embed.weight": 2}
        (rows,) = (rows for _, rows in bundle.added_rows(task))
        assert torch.equal(rows, longer[task]["embed.weight"][11:])
