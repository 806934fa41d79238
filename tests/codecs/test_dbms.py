"""DBMS (2505.11344): both readings of the equation, exact wrapping, the search in weight error."""

import dataclasses
from pathlib import Path

import pytest
import torch
from checks import check_same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from stacked import decoded, keep_largest, random_family, stack
from tiny_net import TASKS, Files, TinyNet
from torch import Tensor

import fusionkit
from fusionkit import (
    DBMS,
    EMR,
    SVD,
    TIES,
    Bundle,
    DeltaCodec,
    Dense,
    Elect,
    Family,
    MagnitudePrune,
    Mean,
    Merged,
    Normalized,
    TaskArithmetic,
    add_tasks,
)
from fusionkit.bundles.journal import identity
from fusionkit.errors import BundleError, CodecError
from fusionkit.registry import from_config, to_config
from fusionkit.task_vectors.processes import ALONE

PRIVATE = ["head.*"]
DELTAS = [name for name, _ in TinyNet().named_parameters() if not name.startswith("head")]
States = dict[str, dict[str, Tensor]]
WRAPPED: list[DeltaCodec] = [
    Dense("bf16"),
    MagnitudePrune(0.1),
    MagnitudePrune(0.1, merge=Mean()),
    SVD(rank=2),
    EMR(),
    EMR(scope="tensor"),
    Merged(TIES()),
    DBMS(SVD(rank=1)),
]
SHIFTS: list[DeltaCodec] = [Merged(Normalized()), Merged(Elect()), MagnitudePrune(0.1), EMR()]


def every(scalars: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return dict.fromkeys(TASKS, scalars)


def scalars_of(bundle: Bundle, task: str) -> tuple[float, float]:
    """α and β as they are in the task's file."""
    pair = load_file(bundle.path / f"task-{task}.safetensors")["/scalars"]
    assert pair.dtype == torch.float32
    assert pair.shape == (2,)
    return float(pair[0]), float(pair[1])


class TestEquation:
    @pytest.mark.parametrize("shift", [0.0, 0.7, -1.5])
    def test_shared_shift(self, base: TinyNet, finetuned: States, shift: float) -> None:
        """θ̂_t = θ₀ + α u + β top-m%(τ_t − α u), u = (1/T) Σ τ_t."""
        codec = DBMS(MagnitudePrune(0.2, dtype="fp32"), Merged(Mean(), dtype="fp32"))
        bundle = fusionkit.compress(base, finetuned, codec.at(every((shift, 1.6))), private=PRIVATE)
        tau = stack(base.state_dict(), finetuned, DELTAS)
        u = tau.mean(0)
        for place, task in enumerate(TASKS):
            residual = tau[place] - shift * u
            kept = keep_largest(residual, round(0.2 * residual.numel()))
            found = decoded(bundle, task, DELTAS)
            torch.testing.assert_close(found, shift * u + 1.6 * kept, rtol=1e-5, atol=1e-6)
            assert scalars_of(bundle, task) == pytest.approx((shift, 1.6))

    def test_own_shift(self, base: TinyNet, finetuned: States) -> None:
        """θ̂_t = θ₀ + α C₁(τ_t) + β C₂(τ_t − α C₁(τ_t)); each task's own direction."""
        codec = DBMS(MagnitudePrune(0.1, dtype="fp32"), MagnitudePrune(0.3, dtype="fp32"))
        bundle = fusionkit.compress(base, finetuned, codec.at(every((0.8, 1.3))), private=PRIVATE)
        tau = stack(base.state_dict(), finetuned, DELTAS)
        for place, task in enumerate(TASKS):
            first = keep_largest(tau[place], round(0.3 * tau[place].numel()))
            residual = tau[place] - 0.8 * first
            second = keep_largest(residual, round(0.1 * residual.numel()))
            found = decoded(bundle, task, DELTAS)
            torch.testing.assert_close(found, 0.8 * first + 1.3 * second, rtol=1e-5, atol=1e-6)

    def test_peru_is_a_special_case(self, base: TinyNet, finetuned: States) -> None:
        """PERU-FFT: u = λ Σ τ_t, α = β = 1, C = top-m%."""
        merge = TaskArithmetic(0.3)
        peru = fusionkit.compress(
            base, finetuned, MagnitudePrune(0.1, merge=merge), private=PRIVATE
        )
        codec = DBMS(MagnitudePrune(0.1), Merged(merge)).at(every((1.0, 1.0)))
        dbms = fusionkit.compress(base, finetuned, codec, private=PRIVATE)
        for task in TASKS:
            check_same(dbms.state_dict(task), peru.state_dict(task))

    @pytest.mark.parametrize("shift", SHIFTS, ids=repr)
    @pytest.mark.parametrize("codec", WRAPPED, ids=repr)
    def test_plain_is_the_codec_to_the_bit(
        self, base: TinyNet, finetuned: States, codec: DeltaCodec, shift: DeltaCodec
    ) -> None:
        with torch.no_grad():  # a weight of −0 must stay one
            base.hidden.weight[0, 0] = -0.0
            for state in finetuned.values():
                state["hidden.weight"][0, 0] = -0.0
        plain = fusionkit.compress(base, finetuned, codec, private=PRIVATE)
        within = DBMS(codec, shift).at(every((0.0, 1.0)))
        wrapped = fusionkit.compress(base, finetuned, within, private=PRIVATE)
        for task in TASKS:
            found, wanted = wrapped.state_dict(task), plain.state_dict(task)
            check_same(found, wanted)
            for name, tensor in wanted.items():
                assert torch.equal(torch.signbit(found[name]), torch.signbit(tensor)), name

    def test_where_one_of_the_two_is_zero(self) -> None:
        base, finetuned = random_family({"a": (4, 3), "b": (5,), "c": (2, 2)}, tasks=2)
        finetuned["task0"]["a"], finetuned["task1"]["a"] = base["a"] + 1, base["a"] - 1
        finetuned["task0"]["b"] = base["b"].clone()
        for task in finetuned:
            finetuned[task]["c"] = base["c"].clone()
        codec = DBMS(Dense("fp32"), Merged(Mean(), dtype="fp32"))
        bundle = fusionkit.compress(base, finetuned, codec.at(dict.fromkeys(finetuned, (2.0, 0.5))))
        moved = finetuned["task1"]["b"] - base["b"]
        # a: the mean is zero; b: of task 0 only the shift is not; c: nothing is.
        wanted = {"a": base["a"] + 0.5, "b": base["b"] + moved + 0.5 * (0 - moved), "c": base["c"]}
        found = bundle.state_dict("task0")
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, msg=name)
        assert torch.equal(found["c"], base["c"])


class TestSearch:
    @settings(deadline=None, max_examples=10)
    @given(seed=st.integers(0, 99), density=st.sampled_from([0.05, 0.3]))
    def test_never_worse_than_the_codec_at_its_best_scale(self, seed: int, density: float) -> None:
        base, finetuned = random_family({"a": (6, 5), "b": (7,)}, tasks=3, seed=seed)
        common = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) * 0.2
        for state in finetuned.values():
            state["a"] = state["a"] + common
        names = list(base)
        tau = stack(base, finetuned, names)
        for inner in (MagnitudePrune(density, dtype="fp32"), SVD(rank=1, dtype="fp32")):
            codec = DBMS(inner, Merged(Mean(), dtype="fp32"))
            found = fusionkit.compress(base, finetuned, codec)
            plain = fusionkit.compress(base, finetuned, inner)
            for place, task in enumerate(finetuned):
                coded = decoded(plain, task, names)
                best = (tau[place] @ coded) / (coded @ coded)
                error = (tau[place] - best * coded).norm()
                assert (tau[place] - decoded(found, task, names)).norm() <= error * (1 + 1e-5)

    def test_a_common_direction_is_found(self) -> None:
        """Tasks that differ in few entries only: the shift takes what they share."""
        base, finetuned = random_family({"a": (40, 10)}, tasks=3, scale=0.0)
        common = torch.randn(40, 10, generator=torch.Generator().manual_seed(1))
        for place, state in enumerate(finetuned.values()):
            state["a"] = base["a"] + common
            state["a"].view(-1)[place] += 30.0
        codec = DBMS(MagnitudePrune(0.01, dtype="fp32"), Merged(Mean(), dtype="fp32"))
        bundle = fusionkit.compress(base, finetuned, codec)
        tau = stack(base, finetuned, ["a"])
        u = tau.mean(0)
        for place, task in enumerate(finetuned):
            projection = float((tau[place] @ u) / (u @ u))
            shift, scale = scalars_of(bundle, task)
            assert min(abs(shift - g * projection) for g in codec.grid if g) < 1e-5
            assert scale == pytest.approx(1, abs=1e-4)  # pruning is a projection

    @pytest.mark.parametrize("scale", [2.0**-100, 2.0**-83, 2.0**83, 2.0**100])
    def test_scalars_do_not_hang_on_the_size_of_the_deltas(self, scale: float) -> None:
        """Nor where their squares are beyond float32."""
        _, finetuned = random_family({"a": (12, 9)}, tasks=2)
        base, codec = {"a": torch.zeros(12, 9)}, DBMS(MagnitudePrune(0.2, dtype="fp32"))
        tuned = {task: {"a": scale * state["a"]} for task, state in finetuned.items()}
        bundles = [fusionkit.compress(base, each, codec) for each in (finetuned, tuned)]
        for task in finetuned:
            plain, scaled = (scalars_of(bundle, task) for bundle in bundles)
            assert scaled == pytest.approx(plain, rel=1e-3)

    def test_no_grid_is_no_shift(self, base: TinyNet, finetuned: States) -> None:
        bundle = fusionkit.compress(base, finetuned, DBMS(SVD(rank=1), grid=()), private=PRIVATE)
        assert [scalars_of(bundle, task) for task in TASKS] == [(0.0, 1.0)] * 3

    def test_deterministic(self, base: TinyNet, finetuned: States, tmp_path: Path) -> None:
        for place in ("a", "b"):
            fusionkit.compress(base, finetuned, DBMS(EMR()), tmp_path / place, private=PRIVATE)
        for path in (tmp_path / "a").iterdir():
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


class TestBundle:
    def test_size_is_the_two_payloads_and_two_scalars(
        self, base: TinyNet, finetuned: States, tmp_path: Path
    ) -> None:
        inner = MagnitudePrune(0.2)
        fusionkit.compress(
            base, finetuned, DBMS(inner).at(every((0.0, 1.0))), tmp_path / "dbms", private=PRIVATE
        )
        fusionkit.compress(base, finetuned, inner, tmp_path / "plain", private=PRIVATE)
        shift = Merged(Normalized(), dtype="int4")
        fusionkit.compress(base, finetuned, shift, tmp_path / "u", private=PRIVATE)

        def payload(path: Path) -> int:
            return sum(tensor.nbytes for tensor in load_file(path).values())

        file = "task-ant.safetensors"
        assert payload(tmp_path / "dbms" / file) == payload(tmp_path / "plain" / file) + 8
        shared = [payload(tmp_path / name / "shared.safetensors") for name in ("dbms", "u")]
        assert shared[0] == shared[1]

    def test_config(self, base: TinyNet, finetuned: States, tmp_path: Path) -> None:
        codec = DBMS(SVD(rank=1), MagnitudePrune(0.1), grid=(0.0, 0.5))
        assert from_config(to_config(codec)) == codec
        at = codec.at(every((1.0, 2.0)))
        assert to_config(at) == to_config(codec)  # scalars are a result, not a setting
        bundle = fusionkit.compress(base, finetuned, at, tmp_path / "b", private=PRIVATE)
        assert Bundle(tmp_path / "b").codec == codec
        assert scalars_of(bundle, "bee") == (1.0, 2.0)

    def test_at_known_scalars_its_repr_is_the_call(self, files: Files) -> None:
        codec = DBMS(MagnitudePrune(0.1))
        at = codec.at({"ant": (0.25, 1.0), "bee": (0.1, 2.0)})
        assert repr(at) == f"{codec!r}.at({{'ant': (0.25, 1.0), 'bee': (0.1, 2.0)}})"
        # What a journal tells runs apart by.
        family = Family(files.base, files.finetuned, private=PRIVATE)
        told = [codec, at, codec.at({"ant": (0.25, 1.0), "bee": (0.1 + 1e-16, 2.0)})]
        assert len({identity(family, each, ALONE) for each in told}) == len(told)

    def test_adding_a_task(self, base: TinyNet, finetuned: States, tmp_path: Path) -> None:
        first = {task: finetuned[task] for task in TASKS[:2]}
        codec = DBMS(EMR(dtype="fp32"), Merged(Mean(), dtype="fp32"))
        fusionkit.compress(base, first, codec, tmp_path / "b", private=PRIVATE)
        before = (tmp_path / "b/task-ant.safetensors").read_bytes()
        bundle = Bundle(tmp_path / "b", base)
        with pytest.raises(BundleError, match="share a vector"):
            add_tasks(bundle, {"cat": finetuned["cat"]})
        add_tasks(bundle, {"cat": finetuned["cat"]}, keep_shared=True)
        assert (tmp_path / "b/task-ant.safetensors").read_bytes() == before
        tau = stack(base.state_dict(), finetuned, DELTAS)
        found = decoded(bundle, "cat", DELTAS)
        assert (tau[2] - found).norm() < tau[2].norm()
        own = DBMS(SVD(rank=1), SVD(rank=1))
        bundle = fusionkit.compress(base, first, own, tmp_path / "c", private=PRIVATE)
        add_tasks(bundle, {"cat": finetuned["cat"]})  # nothing is shared
        whole = fusionkit.compress(base, finetuned, own, private=PRIVATE)
        check_same(bundle.state_dict("cat"), whole.state_dict("cat"))

    def test_factors(self) -> None:
        base, finetuned = random_family({"a": (8, 6)}, tasks=2)
        for shift in (0.0, 0.7):
            codec = DBMS(SVD(rank=1), SVD(rank=2)).at(dict.fromkeys(finetuned, (shift, 1.5)))
            bundle = fusionkit.compress(base, finetuned, codec)
            factors = bundle.factors("task0", "a")
            assert factors is not None
            assert factors.left.shape[1] == (3 if shift else 1)
            delta = bundle.delta("task0", "a")
            torch.testing.assert_close(factors.dense(torch.Size((8, 6))), delta)
        shared = DBMS(SVD(rank=1), Merged(Mean())).at(dict.fromkeys(finetuned, (1.0, 1.0)))
        assert fusionkit.compress(base, finetuned, shared).factors("task0", "a") is None


class TestRefusals:
    def test_what_cannot_be_scaled(self) -> None:
        @dataclasses.dataclass(frozen=True)
        class Exact(Dense):
            unscalable = "it gives back bits, not a delta"

        with pytest.raises(CodecError, match="can't have Exact as its codec: it gives back bits"):
            DBMS(Exact())
        with pytest.raises(CodecError, match="as its shift"):
            DBMS(Dense(), Exact())

    def test_a_tampered_scalar(self, base: TinyNet, finetuned: States, tmp_path: Path) -> None:
        fusionkit.compress(base, finetuned, DBMS(Dense()), tmp_path / "b", private=PRIVATE)
        path = tmp_path / "b/task-ant.safetensors"
        data = bytearray(path.read_bytes())
        place = data.index(load_file(path)["/scalars"].numpy().tobytes())
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(BundleError, match="not what was written"):
            Bundle(tmp_path / "b", base).state_dict("ant")
