"""Merges against the papers' equations, written naively on stacked flat vectors."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from stacked import decoded, keep_largest, random_family, stack
from tiny_net import TASKS, TinyNet
from torch import Tensor

import fusionkit
from fusionkit import TIES, Elect, Family, Mean, Merge, Merged, Normalized, TaskArithmetic
from fusionkit.errors import CodecError
from fusionkit.task_vectors import vectors as task_vectors
from fusionkit.task_vectors.vectors import BLOCK, TaskVectors

PRIVATE = ["head.*"]
DELTAS = [name for name, _ in TinyNet().named_parameters() if not name.startswith("head")]
States = dict[str, dict[str, Tensor]]


def naive_mean(tau: Tensor) -> Tensor:
    return sum(tau[1:], tau[0].clone()) / len(tau)


def naive_ties(tau: Tensor, density: float, scale: float, aggregate: str) -> Tensor:
    """2306.01708, entry by entry."""
    count = round(density * tau.shape[1])
    trimmed = [keep_largest(row, count).tolist() for row in tau]
    merged = []
    for column in zip(*trimmed, strict=True):
        total = sum(column)
        agreed = [value for value in column if value * total > 0]
        value = sum(agreed)
        if aggregate == "mean" and agreed:
            value /= len(agreed)
        merged.append(scale * value)
    return torch.tensor(merged)


def naive_elect(tau: Tensor) -> Tensor:
    """2405.17461, entry by entry; a sum of exactly 0 elects the negative sign."""
    merged = []
    for column in tau.T.tolist():
        sign = 1.0 if sum(column) > 0 else -1.0
        merged.append(sign * max([abs(v) for v in column if v * sign > 0], default=0.0))
    return torch.tensor(merged)


def levelled(tau: Tensor, power: float) -> Tensor:
    """Every row times (mean length / its length)^p."""
    lengths = tau.norm(dim=1, keepdim=True)
    return tau * (lengths.mean() / lengths) ** power


MERGES: list[tuple[Merge, object]] = [
    (Mean(), naive_mean),
    (TaskArithmetic(), lambda tau: 0.3 * len(tau) * naive_mean(tau)),
    (TaskArithmetic(0.9), lambda tau: 0.9 * len(tau) * naive_mean(tau)),
    (TIES(), lambda tau: naive_ties(tau, 0.2, 1.0, "mean")),
    (TIES(0.35, 0.7), lambda tau: naive_ties(tau, 0.35, 0.7, "mean")),
    (TIES(1.0, aggregate="sum"), lambda tau: naive_ties(tau, 1.0, 1.0, "sum")),
    (TIES(0.05, 1.3, "sum"), lambda tau: naive_ties(tau, 0.05, 1.3, "sum")),
    (Elect(), naive_elect),
    (Normalized(), lambda tau: naive_mean(levelled(tau, 1.0))),
    (Normalized(TIES(0.3), 0.5), lambda tau: naive_ties(levelled(tau, 0.5), 0.3, 1.0, "mean")),
    (Normalized(Elect(), 0.0), naive_elect),
]
every_merge = pytest.mark.parametrize(
    ("merge", "naive"), MERGES, ids=lambda m: repr(m) if isinstance(m, Merge) else ""
)


def merged_vectors(merge: Merge, family: Family) -> Tensor:
    """The merged vector of the whole model, straight from the merge."""
    merge_tensor = merge.prepare(family)
    return torch.cat([merge_tensor(vectors).flatten() for vectors in family])


@every_merge
def test_every_task_gets_the_papers_vector(
    base: TinyNet, finetuned: States, tmp_path: Path, merge: Merge, naive: object
) -> None:
    wanted = naive(stack(base.state_dict(), finetuned, DELTAS))  # type: ignore[operator]
    fusionkit.compress(base, finetuned, Merged(merge, "fp32"), tmp_path / "b", private=PRIVATE)
    bundle = fusionkit.Bundle.load(tmp_path / "b")
    for task in TASKS:
        torch.testing.assert_close(decoded(bundle, task, DELTAS), wanted, rtol=1e-6, atol=1e-7)


@every_merge
def test_directly(base: TinyNet, finetuned: States, merge: Merge, naive: object) -> None:
    wanted = naive(stack(base.state_dict(), finetuned, DELTAS))  # type: ignore[operator]
    found = merged_vectors(merge, Family(base, finetuned, private=PRIVATE))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("merge", [Mean(), TaskArithmetic(), TIES(0.1), Elect()], ids=repr)
def test_blocks_give_the_same_as_the_whole(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(TaskVectors, "stack")  # never are all task vectors of a tensor in memory
    sizes = (BLOCK - 1, BLOCK, 2 * BLOCK + 5)
    base, finetuned = random_family({f"w{size}": (size,) for size in sizes}, tasks=3)
    family = Family(base, finetuned)
    merge_tensor = merge.prepare(family)
    in_blocks = [merge_tensor(vectors) for vectors in family]
    monkeypatch.setattr(task_vectors, "BLOCK", 4 * BLOCK)
    for vectors, found in zip(family, in_blocks, strict=True):
        assert len(list(vectors.blocks())) == 1
        assert torch.equal(found, merge_tensor(vectors))


def test_ties_trims_over_the_whole_vector() -> None:
    """One tensor holds everything that is large: nothing of the other one is kept."""
    base = {"large": torch.zeros(4), "small": torch.zeros(16)}
    tuned = {"large": torch.tensor([5.0, -6.0, 7.0, 8.0]), "small": torch.full((16,), 0.1)}
    family = Family(base, {"a": tuned})
    merge = TIES(density=0.2)  # 4 of 20
    merge_tensor = merge.prepare(family)
    found = {vectors.name: merge_tensor(vectors) for vectors in family}
    assert torch.equal(found["large"], tuned["large"])
    assert not found["small"].any()


def test_ties_averages_over_those_present() -> None:
    base = {"w": torch.zeros(4)}
    finetuned = {
        "a": {"w": torch.tensor([3.0, 2.0, 1.0, 4.0])},
        "b": {"w": torch.tensor([1.0, -5.0, 2.0, -4.0])},
        "c": {"w": torch.tensor([0.0, 1.0, 6.0, 0.0])},
    }
    family = Family(base, finetuned)
    # Signs +, −, +, none: the means of {3, 1}, {−5}, {1, 2, 6} and of nothing.
    assert torch.equal(merged_vectors(TIES(1.0), family), torch.tensor([2.0, -5.0, 3.0, 0.0]))
    assert torch.equal(
        merged_vectors(TIES(1.0, 0.5, "sum"), family), torch.tensor([2.0, -2.5, 4.5, 0.0])
    )


def test_elect_counts_a_sum_of_zero_as_negative() -> None:
    base = {"w": torch.zeros(4)}
    tuned = {"a": {"w": torch.tensor([1.0, -2.0, 0.0, 3.0])}}
    tuned["b"] = {"w": -tuned["a"]["w"]}
    found = merged_vectors(Elect(), Family(base, tuned))
    assert torch.equal(found, torch.tensor([-1.0, -2.0, 0.0, -3.0]))


@given(arrays("float32", (3, 8), elements=st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])))
def test_elect_with_ties_and_zeros(values: object) -> None:
    tau = torch.from_numpy(values)
    family = Family({"w": torch.zeros(8)}, {f"t{i}": {"w": row} for i, row in enumerate(tau)})
    assert torch.equal(merged_vectors(Elect(), family), naive_elect(tau))


def test_a_merge_of_one_is_the_task() -> None:
    base, finetuned = random_family({"a": (7, 3), "b": (5,)}, tasks=1)
    tau = stack(base, finetuned, ["a", "b"])[0]
    for merge in (Mean(), TaskArithmetic(1.0), TIES(1.0), Elect()):
        assert torch.equal(merged_vectors(merge, Family(base, finetuned)), tau)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_ties_refuses_a_density(density: float) -> None:
    with pytest.raises(CodecError, match=rf"TIES' density in \(0, 1\], got {density}"):
        TIES(density=density)


def test_normalized_leaves_out_nothing_but_length() -> None:
    """A task that moved ten times as far weighs no more; one that never moved does no harm."""
    base, finetuned = random_family({"a": (30, 20)}, tasks=4)
    for task, factor in (("task0", 10.0), ("task1", 0.0)):
        finetuned[task]["a"] = base["a"] + factor * (finetuned[task]["a"] - base["a"])
    bundle = fusionkit.compress(base, finetuned, Merged(Normalized(), dtype="fp32"))
    merged = decoded(bundle, "task0", ["a"])
    tau = stack(base, finetuned, ["a"])
    towards = [float(merged @ tau[t] / (merged.norm() * tau[t].norm())) for t in (0, 2, 3)]
    assert max(towards) - min(towards) < 0.1
    assert torch.isfinite(merged).all()


@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1e25, 1e30])
def test_normalized_knows_lengths_whose_squares_float32_has_not(scale: float) -> None:
    base, finetuned = random_family({"a": (30, 20)}, tasks=3)
    base, zero = {"a": torch.zeros(30, 20)}, base
    moved = {task: state["a"] - zero["a"] for task, state in finetuned.items()}
    moved["task0"] *= 10
    codec, merged = Merged(Normalized(), dtype="fp32"), []
    for factor in (1.0, scale):
        tuned = {task: {"a": factor * delta} for task, delta in moved.items()}
        merged.append(decoded(fusionkit.compress(base, tuned, codec), "task0", ["a"]) / factor)
    assert torch.allclose(*merged, rtol=1e-4, atol=1e-4 * float(merged[0].abs().max()))
