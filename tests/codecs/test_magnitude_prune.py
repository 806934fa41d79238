"""Magnitude pruning (PERU-FFT, Post-Pruning; 2310.01886): equations, exact counts, size on disk."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from stacked import decoded, keep_largest, random_family, stack
from tiny_net import TASKS, TinyNet
from torch import Tensor

import fusionkit
from fusionkit import Elect, MagnitudePrune, Mean, Merge, TaskArithmetic
from fusionkit.errors import CodecError

PRIVATE = ["head.*"]
DELTAS = [name for name, _ in TinyNet().named_parameters() if not name.startswith("head")]
States = dict[str, dict[str, Tensor]]


def entropy(density: float) -> float:
    """Bits per parameter of a mask."""
    return -density * math.log2(density) - (1 - density) * math.log2(1 - density)


def merged(merge: Merge | None, tau: Tensor) -> Tensor:
    """τ* of the paper, naively."""
    if merge is None:
        return torch.zeros_like(tau[0])
    total = sum(tau[1:], tau[0].clone())
    return total * merge.scale if isinstance(merge, TaskArithmetic) else total / len(tau)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("merge", [None, TaskArithmetic(), Mean()], ids=repr)
def test_the_equation(
    base: TinyNet,
    finetuned: States,
    tmp_path: Path,
    merge: Merge | None,
    density: float,
    scope: str,
) -> None:
    """θ̂_t = θ* + top-m%(θ_t − θ*), over the whole vector or tensor by tensor."""
    state = base.state_dict()
    tau = stack(state, finetuned, DELTAS)
    shared = merged(merge, tau)
    sizes = [state[name].numel() for name in DELTAS] if scope == "tensor" else [tau.shape[1]]
    codec = MagnitudePrune(density, scope, merge, "fp32")  # type: ignore[arg-type]
    fusionkit.compress(base, finetuned, codec, tmp_path / "b", private=PRIVATE)
    bundle = fusionkit.Bundle.load(tmp_path / "b")
    for row, task in zip(tau, TASKS, strict=True):
        kept = [keep_largest(v, round(density * v.numel())) for v in (row - shared).split(sizes)]
        wanted = shared + torch.cat(kept)
        torch.testing.assert_close(decoded(bundle, task, DELTAS), wanted, rtol=1e-6, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=9), min_size=1, max_size=4),
    st.floats(0, 1),
    st.sampled_from(["model", "tensor"]),
)
def test_the_count_is_exact_and_the_first_of_equals_win(
    rows: list[list[int]], density: float, scope: str
) -> None:
    tuned = {f"w{i}": torch.tensor(row, dtype=torch.float32) for i, row in enumerate(rows)}
    base = {name: torch.zeros_like(tensor) for name, tensor in tuned.items()}
    codec = MagnitudePrune(density, scope, dtype="fp32")  # type: ignore[arg-type]
    found = decoded(fusionkit.compress(base, {"t": tuned}, codec), "t", list(tuned))
    whole = torch.cat(list(tuned.values()))
    sizes = [len(row) for row in rows] if scope == "tensor" else [whole.numel()]
    wanted = torch.cat([keep_largest(v, round(density * v.numel())) for v in whole.split(sizes)])
    assert torch.equal(found, wanted)


def test_density_1_keeps_everything_and_0_nothing() -> None:
    base, finetuned = random_family({"a": (8, 5), "b": (7,)}, tasks=2)
    tau = stack(base, finetuned, ["a", "b"])
    for scope in ("model", "tensor"):
        everything = fusionkit.compress(base, finetuned, MagnitudePrune(1, scope, dtype="fp32"))
        nothing = fusionkit.compress(base, finetuned, MagnitudePrune(0, scope))
        for t, task in enumerate(finetuned):
            assert torch.equal(decoded(everything, task, ["a", "b"]), tau[t])
            assert nothing.delta(task, "a") is None
            assert torch.equal(nothing.state_dict(task)["b"], base["b"])


def test_density_0_of_a_merge_is_the_merge() -> None:
    base, finetuned = random_family({"a": (8, 5), "b": (7,)}, tasks=3)
    shared = stack(base, finetuned, ["a", "b"]).mean(0)
    bundle = fusionkit.compress(base, finetuned, MagnitudePrune(0, merge=Mean(), dtype="fp32"))
    for task in finetuned:
        torch.testing.assert_close(decoded(bundle, task, ["a", "b"]), shared)


def test_zero_deltas_are_never_stored(tmp_path: Path) -> None:
    """The k-th largest magnitude is 0: only what is not zero is kept."""
    base = {"a": torch.randn(50), "still": torch.randn(50)}
    tuned = {"a": base["a"].clone(), "still": base["still"]}
    tuned["a"][[3, 17]] += 1.0
    fusionkit.compress(base, {"t": tuned}, MagnitudePrune(0.5, dtype="fp32"), tmp_path / "b")
    parts = load_file(tmp_path / "b" / "task-t.safetensors")
    assert set(parts) == {"a/positions", "a/values"}
    assert parts["a/values"].shape == (2,)
    found = fusionkit.Bundle.load(tmp_path / "b", base).state_dict("t")
    for name, wanted in tuned.items():
        torch.testing.assert_close(found[name], wanted)


def test_the_residual_is_taken_against_the_shared_vector_as_stored() -> None:
    """A coarse shared vector does not harm the entries that are kept."""
    base, finetuned = random_family({"w": (64, 4)}, tasks=3)
    tau = stack(base, finetuned, ["w"])
    bundle = fusionkit.compress(base, finetuned, MagnitudePrune(1, merge=Mean(), dtype="int4"))
    coarse = (bundle.shared_parts("w"), tau.mean(0))
    assert coarse[0]["merged"].dtype == torch.uint8
    for t, task in enumerate(finetuned):
        # At most half a step of the residual's own scale, and none of the vector's.
        found = decoded(bundle, task, ["w"])
        residual = (tau[t] - tau.mean(0)).abs().max() + tau.mean(0).abs().max() / 14
        assert (found - tau[t]).abs().max() <= 1.02 * residual / 14


def test_any_merge_will_do() -> None:
    base, finetuned = random_family({"w": (9, 9)}, tasks=3)
    bundle = fusionkit.compress(base, finetuned, MagnitudePrune(1, merge=Elect(), dtype="fp32"))
    for t, task in enumerate(finetuned):
        wanted = stack(base, finetuned, ["w"])[t]
        torch.testing.assert_close(decoded(bundle, task, ["w"]), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.01, 0.05, 0.1])
def test_size_on_disk(tmp_path: Path, density: float, scope: str) -> None:
    """Positions within 1.10 H(d) bits a parameter, values 16 bits each, and little else."""
    shapes = {"embed": (1000, 400), "a.weight": (800, 600), "a.bias": (600,), "b": (384, 384)}
    base, finetuned = random_family(shapes, tasks=1)
    codec = MagnitudePrune(density, scope)  # type: ignore[arg-type]
    fusionkit.compress(base, finetuned, codec, tmp_path / "b")
    file = tmp_path / "b" / "task-task0.safetensors"
    parts = load_file(file)
    total = sum(tensor.numel() for tensor in base.values())
    assert total > 1_000_000
    positions = sum(p.nbytes for key, p in parts.items() if key.endswith("/positions"))
    values = [p for key, p in parts.items() if key.endswith("/values")]
    kept = sum(p.numel() for p in values)
    whole = [total] if scope == "model" else [tensor.numel() for tensor in base.values()]
    assert kept == sum(round(density * count) for count in whole)
    assert all(p.dtype == torch.float16 for p in values)
    assert 8 * positions / total <= 1.10 * entropy(density)
    assert file.stat().st_size - positions - 2 * kept < 2000  # the header


@pytest.mark.parametrize(("dtype", "levels"), [("int8", 127), ("int4", 7)])
def test_error_of_integer_values(dtype: str, levels: int) -> None:
    """At most half a step: each group of 128 kept values has a scale of its own."""
    base, finetuned = random_family({"w": (70, 90)}, tasks=2)
    exact = fusionkit.compress(base, finetuned, MagnitudePrune(0.3, dtype="fp32"))
    coarse = fusionkit.compress(base, finetuned, MagnitudePrune(0.3, dtype=dtype))  # type: ignore[arg-type]
    for task in finetuned:
        wanted, found = decoded(exact, task, ["w"]), decoded(coarse, task, ["w"])
        place = wanted.nonzero().flatten()
        assert not found[wanted == 0].any()
        for group in place.split(128):
            scale = 1.02 * float(wanted[group].abs().max()) / levels  # rounded up to bfloat16
            assert (found[group] - wanted[group]).abs().max() <= 0.5 * scale


@pytest.mark.parametrize("density", [-0.01, 1.5, float("nan")])
def test_a_density_outside_0_to_1_is_refused(density: float) -> None:
    with pytest.raises(CodecError, match=rf"density in \[0, 1\], got {density}"):
        MagnitudePrune(density)
