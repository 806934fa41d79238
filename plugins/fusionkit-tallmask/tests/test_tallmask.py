"""TALL-masks and consensus merging (2405.07813): their equations, sizes and the choice of λ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fusionkit_tallmask import GRID, Consensus, TALLMask, choose_thresholds
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusionkit
from fusionkit import TIES, Family, Mean, Merged, TaskArithmetic
from fusionkit.errors import CodecError
from fusionkit.testing import CodecContract, models

NAMES = ["square", "wide", "bias", "conv2d"]


class TestTALLMask(CodecContract):
    codecs = (
        TALLMask(),
        TALLMask({"ant": 0.2, "bee": 0.4, "cat": 0.6}, merge=TIES(), dtype="int8"),
    )


class TestConsensus(CodecContract):
    codecs = (Merged(Consensus()), Merged(Consensus(Mean(), agree=1, scale=1.0), dtype="bf16"))


def vectors(arguments: dict[str, Any], name: str) -> Tensor:
    base = arguments["base"][name]
    return torch.stack([state[name] - base for state in arguments["finetuned"].values()])


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0, 5.0])
def test_the_mask(threshold: float) -> None:
    """θ̂ − θ₀ = M ⊙ τ*, M = 1 where |τ_t| ≥ λ |τ* − τ_t|, entry by entry."""
    arguments = models()
    bundle = fusionkit.compress(codec=TALLMask(threshold, dtype="fp32"), **arguments)
    for name in NAMES:
        tau = vectors(arguments, name)
        merged = sum(tau[1:], tau[0])
        for place, task in enumerate(bundle.tasks):
            found = bundle.delta(task, name)
            assert found is not None
            for entry, (own, both) in enumerate(
                zip(tau[place].flatten().tolist(), merged.flatten().tolist(), strict=True)
            ):
                wanted = both if abs(own) >= threshold * abs(both - own) - 1e-9 else 0.0
                assert float(found.flatten()[entry]) == pytest.approx(wanted, abs=1e-5)


def test_of_one_task_nothing_is_lost() -> None:
    """With one task τ* = τ, and every mask is full."""
    arguments = models()
    arguments["finetuned"] = {"ant": arguments["finetuned"]["ant"]}
    bundle = fusionkit.compress(codec=TALLMask(dtype="fp32"), **arguments)
    for name in NAMES:
        found = bundle.delta("ant", name)
        assert found is not None
        assert torch.equal(found, vectors(arguments, name)[0])


def test_a_mask_costs_one_bit(tmp_path: Path) -> None:
    base = {"w": torch.zeros(1000, 1000)}
    finetuned = {task: {"w": torch.randn(1000, 1000)} for task in "abc"}
    bundle = fusionkit.compress(base, finetuned, TALLMask(), tmp_path / "b")
    for path in bundle.path.glob("task-*"):
        assert path.stat().st_size <= 1000 * 1000 / 8 + 300


@pytest.mark.parametrize("agree", [0, 1, 2, 3])
def test_consensus_keeps_what_enough_tasks_use(agree: int) -> None:
    arguments = models()
    consensus = Consensus(threshold={"ant": 0.2, "bee": 0.5, "cat": 0.9}, agree=agree, scale=0.7)
    merge_tensor = consensus.prepare(family := Family(**arguments))
    for each in family:
        if each.name not in NAMES:
            continue
        tau = each.stack()
        merged = tau.sum(0)
        limits = torch.tensor([0.2, 0.5, 0.9]).view(-1, *[1] * merged.ndim)
        used = (tau.abs() >= limits * (merged - tau).abs()).sum(0) >= agree
        found = merge_tensor(each)
        assert torch.allclose(found, torch.where(used, 0.7 * merged, 0.0), atol=1e-6)


def test_bad_thresholds_are_refused() -> None:
    with pytest.raises(CodecError, match="threshold to be at least 0, got -1"):
        TALLMask(-1)
    with pytest.raises(CodecError, match="agree to be at least 0"):
        Consensus(agree=-1)
    with pytest.raises(CodecError, match="TALLMask has no threshold of task 'bee'"):
        fusionkit.compress(codec=TALLMask({"ant": 0.2, "cat": 0.3}), **models())
    with pytest.raises(CodecError, match="Consensus has no threshold of task 'ant'"):
        fusionkit.compress(codec=Merged(Consensus(threshold={})), **models())


class Rows(LightningDataModule):
    """Rows of two tasks, labelled by their fine-tuned models."""

    def __init__(self, labels: dict[str, Tensor], inputs: Tensor) -> None:
        super().__init__()
        self.tasks = list(labels)
        self.num_classes = dict.fromkeys(labels, 2)
        self._sets = [TensorDataset(inputs, each) for each in labels.values()]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(each, 64) for each in self._sets]


def test_thresholds_are_chosen_by_validation_scores(tmp_path: Path) -> None:
    """Each task's is the first of the grid with its best score, all found in real evaluations."""
    torch.manual_seed(0)
    base = nn.Linear(12, 2)
    tuned = {
        task: {n: t + torch.randn_like(t) for n, t in base.state_dict().items()} for task in "ab"
    }
    inputs = torch.randn(200, 12)
    labels = {task: (inputs @ s["weight"].T + s["bias"]).argmax(1) for task, s in tuned.items()}
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    module = fusionkit.ReuseModule(base, finetuned=tuned)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", enable_checkpointing=False, **quiet)
    codec = choose_thresholds(
        module, Rows(labels, inputs), trainer, TALLMask(merge=TaskArithmetic(1.0))
    )
    assert isinstance(codec.threshold, dict)
    for task in tuned:
        scores = []
        for value in GRID:
            bundle = fusionkit.compress(start, tuned, TALLMask(value))
            weights = bundle.state_dict(task)
            found = (inputs @ weights["weight"].T + weights["bias"]).argmax(1)
            scores.append(int((found == labels[task]).sum()))
        assert codec.threshold[task] == GRID[scores.index(max(scores))]
