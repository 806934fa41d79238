"""BitDelta (2402.10193): its equations, its bytes, and scales learned by the Trainer."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from fusionkit_bitdelta import BitDelta
from lightning.pytorch import LightningDataModule, Trainer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusionkit
from fusionkit import DBMS, SVD
from fusionkit.errors import CodecError
from fusionkit.testing import CodecContract, models


class TestContract(CodecContract):
    codecs = (
        BitDelta(),
        BitDelta(keep=(), dtype="int8"),
        BitDelta(scales="row"),
        BitDelta(keep=(), scales="column"),
    )


def test_the_equation() -> None:
    """sgn(τ) mean|τ| per matrix, +1 at 0; the rest to fp16."""
    arguments = models()
    bundle = fusionkit.compress(codec=BitDelta(), **arguments)
    for task, state in arguments["finetuned"].items():
        for name, tensor in arguments["base"].items():
            if name in ("head.weight", "decoder"):
                continue
            tau = state[name] - tensor
            delta = bundle.delta(task, name)
            if not tau.any():
                assert delta is None
            elif tau.ndim < 2 or name == "embedding":
                assert delta is not None
                assert torch.allclose(delta, tau, rtol=1e-3, atol=1e-6)
            else:
                signs = torch.where(tau < 0, -1.0, 1.0)
                assert delta is not None
                assert torch.allclose(delta, signs * tau.abs().sum() / tau.numel(), rtol=1e-6)


def test_a_zero_counts_as_positive() -> None:
    parts = BitDelta().encode_tensor(torch.tensor([[0.0, -3.0], [1.0, -0.0]]), "w")
    assert BitDelta().decode(parts, torch.Size((2, 2))).tolist() == [[1, -1], [1, 1]]


def test_the_scale_is_the_best_in_weight_error() -> None:
    tau = torch.randn(32, 16)
    parts = BitDelta().encode_tensor(tau, "w")
    best = float(parts["scale"])

    def error(scale: float) -> Tensor:
        return (
            tau - BitDelta().decode({**parts, "scale": torch.tensor([scale])}, tau.shape)
        ).norm()

    assert error(best) < error(best * 1.01)
    assert error(best) < error(best * 0.99)


def test_a_sign_costs_one_bit(tmp_path: Path) -> None:
    """The file of one 1000 × 1000 matrix: a megabit, and a header."""
    base = {"w": torch.randn(1000, 1000)}
    tuned = {"w": base["w"] + torch.randn(1000, 1000)}
    bundle = fusionkit.compress(base, {"a": tuned}, BitDelta(), tmp_path / "b")
    [path] = bundle.path.glob("task-*")
    assert path.stat().st_size <= 1000 * 1000 / 8 + 4 + 400


@pytest.mark.parametrize(("scales", "axis"), [("row", 1), ("column", 0)])
def test_a_scale_for_every_row_or_column(scales: Literal["row", "column"], axis: int) -> None:
    """sgn(τ) times the mean of |τ| along it; of more axes, the first is the rows'."""
    codec = BitDelta(scales=scales)
    for shape in ((5, 7), (4, 3, 2, 2)):
        tau = torch.randn(shape)
        tau[0] *= 10
        parts = codec.encode_tensor(tau, "w")
        flat = tau.view(shape[0], -1)
        wanted = flat.sign() * flat.abs().mean(axis, keepdim=True)
        found = codec.decode(parts, tau.shape)
        assert found.shape == tau.shape
        assert torch.allclose(found.view_as(flat), wanted, rtol=2**-8, atol=0)
        assert parts["scale"].shape == (flat.shape[1 - axis],)
        plain = BitDelta()
        whole = plain.decode(plain.encode_tensor(tau, "w"), tau.shape)
        assert (tau - found).norm() < (tau - whole).norm()


def test_a_row_of_zeros_comes_back_as_zeros() -> None:
    tau = torch.tensor([[0.0, 0.0], [1.0, -3.0]])
    parts = BitDelta(scales="row").encode_tensor(tau, "w")
    assert BitDelta(scales="row").decode(parts, tau.shape).tolist() == [[0, 0], [2, -2]]


@pytest.mark.parametrize(("scales", "count"), [("row", 1000), ("column", 500)])
def test_a_scale_costs_16_bits(
    scales: Literal["row", "column"], count: int, tmp_path: Path
) -> None:
    base = {"w": torch.zeros(1000, 500)}
    models = {"a": {"w": torch.randn(1000, 500)}}
    plain, own = (
        fusionkit.compress(base, models, codec, tmp_path / codec.scales)
        for codec in (BitDelta(), BitDelta(scales=scales))
    )
    more = own.manifest.tasks["a"].file.bytes - plain.manifest.tasks["a"].file.bytes
    assert more == pytest.approx(2 * count - 4, abs=16)  # but for the header's own padding


def test_other_scales_are_refused() -> None:
    with pytest.raises(CodecError, match="matrix, row or column, got 'rows'"):
        BitDelta(scales="rows")  # type: ignore[arg-type]


def test_low_rank_takes_what_the_signs_leave(tmp_path: Path) -> None:
    """D-QReLO (2604.16940) is DBMS with BitDelta as its shift: u + SVD_r(τ − u), α = β = 1."""
    base = {"w": torch.randn(40, 30), "bias": torch.randn(30)}
    tuned = {name: tensor + torch.randn(tensor.shape).pow(3) for name, tensor in base.items()}
    tau = tuned["w"] - base["w"]
    u = torch.where(tau < 0, -1.0, 1.0) * tau.abs().mean()
    left, values, right = torch.linalg.svd(tau - u)
    wanted = u + left[:, :3] * values[:3] @ right[:3]
    low_rank = SVD(rank=3, dtype="fp32", vectors="drop")  # which BitDelta keeps whole
    codec = DBMS(low_rank, BitDelta(dtype="fp32"), grid=(1.0,))
    bundle = fusionkit.compress(base, {"a": tuned}, codec, tmp_path / "b")
    delta, bias = bundle.delta("a", "w"), bundle.delta("a", "bias")
    assert delta is not None
    assert bias is not None
    assert torch.allclose(delta, wanted, atol=1e-4)
    assert torch.allclose(bias, tuned["bias"] - base["bias"], rtol=1e-5, atol=1e-5)
    stored = load_file(bundle.path / "task-a.safetensors")
    assert stored["/scalars"].tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    low_rank_bytes, signs = 4 * 3 * (40 + 30), 40 * 30 // 8 + 4
    assert sum(each.nbytes for each in stored.values()) == low_rank_bytes + signs + 4 * 30 + 8


@pytest.mark.parametrize("keep", [("w*",), ("nothing",)])
def test_keep_names_what_is_kept_whole(keep: tuple[str, ...]) -> None:
    parts = BitDelta(keep=keep).encode_tensor(torch.randn(4, 4), "w1")
    assert ("values" in parts) == (keep == ("w*",))


class Rows(LightningDataModule):
    """Unlabelled rows of two tasks."""

    tasks = ("a", "b")

    def train_dataloader(self) -> list[DataLoader[Any]]:
        rows = TensorDataset(torch.randn(64, 12), torch.zeros(64, dtype=torch.int64))
        return [DataLoader(rows, batch_size=32)] * 2


@pytest.mark.parametrize("scales", ["matrix", "row", "column"])
def test_scales_are_distilled(scales: Literal["matrix", "row", "column"], tmp_path: Path) -> None:
    """The fine-tuned model's outputs are matched better; signs and sizes stay as they are."""
    base = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    tuned = {
        task: {n: t + 0.3 * torch.randn_like(t).pow(3) for n, t in base.state_dict().items()}
        for task in "ab"
    }
    module = fusionkit.ReuseModule(base, finetuned=tuned, codec=BitDelta(scales=scales))
    plain = module.compress()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=20, accelerator="cpu", enable_checkpointing=False, **quiet)
    bundle = fusionkit.calibrate(module, Rows(), tmp_path / "b", trainer=trainer)
    for task, record in bundle.manifest.tasks.items():
        assert record.calibration is not None
        assert record.calibration.loss_after < 0.8 * record.calibration.loss_before
        assert record.file.bytes == plain.manifest.tasks[task].file.bytes
        before, after = (
            load_file(each.path / f"task-{task}.safetensors") for each in (plain, bundle)
        )
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"0.weight/scale", "2.weight/scale"}
