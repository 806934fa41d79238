"""TSV-Compress and TSV-Merge (2412.00081): their equations, re-derived with LAPACK's SVD."""

import pytest
import torch
from fusionkit_tsv import TSVCompress, TSVMerge
from torch import Tensor

import fusionkit
from fusionkit import Mean, Merged
from fusionkit.errors import CodecError
from fusionkit.testing import CodecContract, models


class TestTSVCompress(CodecContract):
    codecs = (TSVCompress(), TSVCompress(tasks=5, dtype="int8"))


class TestTSVMerge(CodecContract):
    codecs = (Merged(TSVMerge()), Merged(TSVMerge(0.5), dtype="fp32"))


def family(
    tasks: int, shape: tuple[int, ...]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    base = {"w": torch.randn(shape), "b": torch.randn(shape[0])}
    finetuned = {
        f"t{place}": {name: tensor + torch.randn_like(tensor) for name, tensor in base.items()}
        for place in range(tasks)
    }
    return base, finetuned


@pytest.mark.parametrize("tasks", [1, 2, 3, 20])
def test_a_task_keeps_its_share_of_the_directions(tasks: int) -> None:
    base, finetuned = family(tasks, (16, 24))
    bundle = fusionkit.compress(base, finetuned, TSVCompress(dtype="fp32"))
    for task, state in finetuned.items():
        u, s, vh = torch.linalg.svd(state["w"] - base["w"], full_matrices=False)
        k = max(round(16 / tasks), 1)
        found = bundle.delta(task, "w")
        assert found is not None
        assert torch.allclose(found, (u[:, :k] * s[:k]) @ vh[:k], atol=1e-4)
        vector = bundle.delta(task, "b")
        assert vector is not None
        assert torch.allclose(vector, state["b"] - base["b"], atol=1e-6)


def test_the_number_of_tasks_can_be_given() -> None:
    base, finetuned = family(1, (16, 24))
    bundle = fusionkit.compress(base, finetuned, TSVCompress(tasks=4))
    factors = bundle.factors("t0", "w")
    assert factors is not None
    assert factors.left.shape == (16, 4)
    with pytest.raises(CodecError, match="tasks to be at least 1, got 0"):
        TSVCompress(0)


@pytest.mark.parametrize(("tasks", "shape"), [(2, (12, 20)), (3, (20, 12)), (5, (4, 9))])
def test_merging_whitens_the_directions(tasks: int, shape: tuple[int, int]) -> None:
    """U⊥ Σ V⊥ᵀ with Procrustes' solutions, from LAPACK's SVDs."""
    base, finetuned = family(tasks, shape)
    bundle = fusionkit.compress(base, finetuned, Merged(TSVMerge(0.9), dtype="fp32"))
    k = max(min(shape) // tasks, 1)
    us, ss, vs = [], [], []
    for state in finetuned.values():
        u, s, vh = torch.linalg.svd(state["w"] - base["w"], full_matrices=False)
        us.append(u[:, :k])
        ss.append(s[:k])
        vs.append(vh[:k].T)
    whitened = []
    for side in (us, vs):
        p, _, qh = torch.linalg.svd(torch.cat(side, 1), full_matrices=False)
        whitened.append(p @ qh)
    wanted = 0.9 * whitened[0] @ torch.diag(torch.cat(ss)) @ whitened[1].T
    found = bundle.delta("t0", "w")
    assert found is not None
    assert torch.allclose(found, wanted, atol=1e-3)
    vectors = torch.stack([state["b"] - base["b"] for state in finetuned.values()])
    bias = bundle.delta("t0", "b")
    assert bias is not None
    assert torch.allclose(bias, 0.9 * vectors.mean(0), atol=1e-5)


def test_directions_that_are_orthogonal_already_are_only_added() -> None:
    """Tasks that live in different rows and columns do not interfere: τ* = Σ τ_t."""
    base = {"w": torch.zeros(8, 8)}
    finetuned = {}
    for place in range(2):
        w = torch.zeros(8, 8)
        part = slice(4 * place, 4 * place + 4)
        w[part, part] = torch.randn(4, 4)
        finetuned[f"t{place}"] = {"w": w}
    bundle = fusionkit.compress(base, finetuned, Merged(TSVMerge(), dtype="fp32"))
    found = bundle.delta("t0", "w")
    assert found is not None
    assert torch.allclose(found, finetuned["t0"]["w"] + finetuned["t1"]["w"], atol=1e-4)


def test_it_is_not_the_mean() -> None:
    arguments = models()
    one, other = (
        fusionkit.compress(codec=Merged(merge), **arguments).delta("ant", "square")
        for merge in (TSVMerge(), Mean())
    )
    assert one is not None
    assert other is not None
    assert not torch.allclose(one, other, atol=1e-2)
