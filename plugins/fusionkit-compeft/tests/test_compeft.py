"""ComPEFT (2311.13171): its equation re-derived, and ternary values close to their entropy."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fusionkit_compeft import ComPEFT
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusionkit
from fusionkit.errors import CodecError
from fusionkit.testing import CodecContract, models

NAMES = [
    "scalar", "one", "bias", "empty", "empty_matrix", "square", "wide", "tall", "row", "conv1d",
    "conv2d", "transposed", "embedding", "still", "still_in_one",
]  # fmt: skip


class TestContract(CodecContract):
    codecs = (ComPEFT(), ComPEFT(density=0.7, scale=2.0), ComPEFT(density=1.0))


@pytest.mark.parametrize("scale", [None, 0.5, 3.0])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_the_equation(density: float, scale: float | None) -> None:
    arguments = models()
    bundle = fusionkit.compress(codec=ComPEFT(density, scale), **arguments)
    for task, state in arguments["finetuned"].items():
        tau = torch.cat([(state[n] - arguments["base"][n]).flatten() for n in NAMES])
        count = min(round(density * tau.numel()), int((tau != 0).sum()))
        order = tau.abs().argsort(descending=True)[:count]
        magnitude = tau.abs()[order].mean()
        if scale is not None:
            magnitude = scale * tau.std(correction=0)
        wanted = torch.zeros_like(tau)
        wanted[order] = tau[order].sign() * magnitude
        assert torch.allclose(_flat(bundle, task), wanted, rtol=1e-5)


def test_the_default_scalar_is_the_best_in_weight_error() -> None:
    arguments = models()
    base = arguments["base"]
    errors = []
    for scale in (None, 1.5, 1.9, 2.0, 2.1, 2.5, 3.0):
        bundle = fusionkit.compress(codec=ComPEFT(0.1, scale), **arguments)
        tau = torch.cat([(arguments["finetuned"]["bee"][n] - base[n]).flatten() for n in NAMES])
        errors.append(float((tau - _flat(bundle, "bee")).norm()))
    assert errors[0] == min(errors)


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_a_ternary_value_costs_its_entropy(density: float, tmp_path: Path) -> None:
    """H(d) for where it is not zero, and d for the signs; on disk at most a tenth more."""
    size = 1024
    base = {"w": torch.zeros(size, size)}
    bundle = fusionkit.compress(
        base, {"a": {"w": torch.randn(size, size)}}, ComPEFT(density), tmp_path / "b"
    )
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density) + density
    [path] = bundle.path.glob("task-*")
    assert 8 * path.stat().st_size <= 1.10 * entropy * size * size
    assert 8 * path.stat().st_size >= entropy * size * size


@pytest.mark.parametrize("density", [0, 1.1, -0.1, math.nan])
def test_a_bad_density_is_refused(density: float) -> None:
    with pytest.raises(CodecError, match=r"density in \(0, 1\], got"):
        ComPEFT(density)


def _flat(bundle: fusionkit.Bundle, task: str) -> Tensor:
    flat = []
    for name in NAMES:
        delta = bundle.delta(task, name)
        count = math.prod(bundle.manifest.base.tensors[name].shape)
        flat.append(torch.zeros(count) if delta is None else delta.flatten())
    return torch.cat(flat)


class Rows(LightningDataModule):
    """Unlabelled rows of one task."""

    tasks = ("a",)

    def train_dataloader(self) -> list[DataLoader[Any]]:
        rows = TensorDataset(torch.randn(64, 12), torch.zeros(64, dtype=torch.int64))
        return [DataLoader(rows, batch_size=32)]


def test_the_scalar_is_tuned_by_the_trainer() -> None:
    """One number for the whole model, found where a grid finds it."""
    base = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    tuned = {n: t + 0.3 * torch.randn_like(t) for n, t in base.state_dict().items()}
    module = fusionkit.ReuseModule(base, finetuned={"a": tuned}, codec=ComPEFT(0.2))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=40, accelerator="cpu", enable_checkpointing=False, **quiet)
    torch.manual_seed(1)
    bundle = fusionkit.calibrate(module, Rows(), trainer=trainer)
    record = bundle.manifest.tasks["a"].calibration
    assert record is not None
    assert record.loss_after < record.loss_before
    learned = float(bundle.task_parts("a", fusionkit.WHOLE_MODEL)["scale"])
    plain = float(module.compress().task_parts("a", fusionkit.WHOLE_MODEL)["scale"])
    torch.manual_seed(1)
    [(tokens, _)] = [
        (torch.cat([x for x, _ in loader]), None) for loader in Rows().train_dataloader()
    ]
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    start = {name: tensor.clone() for name, tensor in module.base_weights.items()}

    def loss(scale: float) -> float:
        model.load_state_dict(tuned)
        teacher = model(tokens).log_softmax(-1)
        deltas = {n: bundle.delta("a", n) for n in start}
        model.load_state_dict(
            {
                n: t if (d := deltas[n]) is None else t + d * scale / learned
                for n, t in start.items()
            }
        )
        student = model(tokens).log_softmax(-1)
        return float((teacher.exp() * (teacher - student)).sum(-1).mean().detach())

    assert loss(learned) == pytest.approx(record.loss_after, rel=1e-3)
    assert loss(plain) == pytest.approx(record.loss_before, rel=1e-3)
    assert loss(learned) <= min(loss(learned * (1 + step)) for step in (-0.1, -0.03, 0.03, 0.1))
