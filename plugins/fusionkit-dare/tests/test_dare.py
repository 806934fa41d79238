"""DARE (2311.03099): unbiased, seeded, without stored positions; and before any merge."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from fusionkit_dare import DARE, DAREMerge, kept, key_of, placed

import fusionkit
from fusionkit import TIES, Family, Mean, Merged, Normalized, TaskArithmetic
from fusionkit.errors import BundleError, CodecError
from fusionkit.testing import CodecContract, models

CPU = torch.device("cpu")
MASK64 = (1 << 64) - 1


class TestDARE(CodecContract):
    codecs = (
        DARE(),
        DARE(0.5, seed=3, dtype="int4"),
        DARE(0.0, dtype="fp32"),
        DARE(0.8, spread=0.15),
        DARE(0.7, spread=0.1, shrink=0.5, dtype="fp32"),
        DARE(0.5, shrink=0.25, dtype="fp32"),
    )


class TestDAREMerge(CodecContract):
    codecs = (Merged(DAREMerge()), Merged(DAREMerge(Normalized(TIES()), 0.3, seed=1)))


def split_mix(key: int, place: int) -> int:
    """SplitMix64 of Steele et al. 2014, in Python's integers."""
    z = (key + (place + 1) * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789])
def test_the_draws_are_split_mix_64(key: int) -> None:
    wanted = [(split_mix(key & MASK64, i) >> 11) / 2**53 < 0.3 for i in range(500)]
    assert kept(key, 500, 0.7, CPU).tolist() == wanted
    assert kept(key, 300, 0.7, CPU, start=200).tolist() == wanted[200:]


def test_split_mix_is_the_published_one() -> None:
    """The first outputs for seed 1234567, as published with the reference implementation."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [split_mix(1234567, i) for i in range(3)] == published


def test_a_key_is_the_seed_the_task_and_the_tensor() -> None:
    digest = hashlib.sha256(b"3\0ant\0w.weight").digest()
    assert key_of(3, "ant", "w.weight") == int.from_bytes(digest[:8], "little", signed=True)


def test_long_tensors_are_drawn_in_blocks() -> None:
    whole = kept(7, (1 << 20) + 50, 0.5, CPU)
    assert torch.equal(whole[1 << 20 :], kept(7, 50, 0.5, CPU, start=1 << 20))


@pytest.mark.parametrize("drop", [0.0, 0.5, 0.9, 0.99])
def test_it_drops_its_share_and_stays_unbiased(drop: float) -> None:
    tau = {"w": torch.ones(1000, 1000)}
    bundle = fusionkit.compress(
        {"w": torch.zeros(1000, 1000)}, {"a": tau}, DARE(drop, dtype="fp32")
    )
    delta = bundle.delta("a", "w")
    assert delta is not None
    share = float((delta != 0).float().mean())
    assert share == pytest.approx(1 - drop, abs=5 * (drop * (1 - drop)) ** 0.5 / 1000 + 1e-9)
    assert torch.allclose(delta[delta != 0], torch.tensor(1 / (1 - drop)))
    rows = (delta != 0).float().mean(0)  # no pattern: rows and columns alike
    assert float(rows.std()) == pytest.approx((drop * (1 - drop) / 1000) ** 0.5, rel=0.2, abs=1e-9)


def test_seeds_tasks_and_tensors_are_drawn_apart() -> None:
    masks = [
        kept(key_of(*of), 10_000, 0.5, CPU).float()
        for of in ((0, "a", "w"), (1, "a", "w"), (0, "b", "w"), (0, "a", "v"))
    ]
    same = torch.stack(masks) @ torch.stack(masks).T / 10_000
    assert torch.allclose(same - torch.diag(same.diag()), 0.25 * (1 - torch.eye(4)), atol=0.02)


def test_only_values_are_stored(tmp_path: Path) -> None:
    base = {"w": torch.zeros(1000, 1000)}
    tuned = {"w": torch.randn(1000, 1000)}
    bundle = fusionkit.compress(base, {"a": tuned}, DARE(0.9), tmp_path / "b")
    [path] = bundle.path.glob("task-*")
    assert path.stat().st_size == pytest.approx(1000 * 1000 * 0.1 * 2, rel=0.01)


def test_more_is_dropped_where_the_entries_deviate_less() -> None:
    """A third of the parameters each at p + d and p, the rest at p − d n_low / n_high."""
    sizes = {"a": 20, "b": 10, "c": 30, "d": 25, "e": 15, "frozen": 1000}
    deviations = {"a": 0.4, "b": 0.1, "c": 0.3, "d": 0.5, "e": 0.2}  # b e | c | a d
    low, middle, high = 0.95, 0.9, 0.9 - 0.05 * 25 / 45
    wanted = {"b": low, "e": low, "c": middle, "a": high, "d": high}
    rates = placed(deviations, sizes, 0.9, 0.05)
    assert rates == pytest.approx(wanted)
    assert sum(rates[name] * sizes[name] for name in rates) == pytest.approx(0.9 * 100)


@pytest.mark.parametrize("wanted", [[], [0.6], [0.6, 0.6], [0.8, 0.6, 0.4]], ids=len)
def test_few_tensors_are_placed_too(wanted: list[float]) -> None:
    deviations = {name: 0.1 * place for place, name in enumerate("abc"[: len(wanted)])}
    rates = placed(deviations, dict.fromkeys("abc", 10), 0.6, 0.2)
    assert list(rates.values()) == pytest.approx(wanted)


def laid_out(scales: dict[str, float]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base of zeros, and a model moved by ± so much in each of its matrices."""
    base = {name: torch.zeros(300, 400) for name in scales}
    tuned = {
        name: scale * torch.where(torch.rand(300, 400) < 0.5, -1.0, 1.0)
        for name, scale in scales.items()
    }
    return base, tuned


def test_a_spread_moves_the_drops_and_leaves_each_tensor_unbiased(tmp_path: Path) -> None:
    base, tuned = laid_out({"most": 3.0, "least": 1.0, "middle": 2.0})
    found = {}
    for spread in (0.0, 0.1):
        codec = DARE(0.8, spread=spread, dtype="fp32")
        found[spread] = fusionkit.compress(base, {"a": tuned}, codec, tmp_path / str(spread))
    for name, drop in (("least", 0.9), ("middle", 0.8), ("most", 0.7)):
        delta = found[0.1].delta("a", name)
        assert delta is not None
        mask = kept(key_of(0, "a", name), 120_000, drop, CPU).view(300, 400)
        assert torch.allclose(delta, tuned[name] * mask / (1 - drop))
    plain, spread = (each.manifest.tasks["a"].file.bytes for each in found.values())
    assert spread == pytest.approx(plain, rel=0.01)


def test_a_task_is_shrunk_by_its_trace_norm() -> None:
    """γ = max(g, N / N_t): here N_t is 1, 1.6 and 5 times N; vectors have no part in it."""
    base = {"u": torch.zeros(40, 30), "v": torch.zeros(6, 2, 5), "bias": torch.zeros(1000)}
    first = {name: torch.randn(tensor.shape) for name, tensor in base.items()}
    norms = {"a": 1.0, "b": 1.6, "c": 5.0}
    models = {task: {n: by * t for n, t in first.items()} for task, by in norms.items()}
    models["b"]["bias"] = 100 * first["bias"]
    codec = DARE(0.5, dtype="fp32")
    plain = fusionkit.compress(base, models, codec)
    shrunk = fusionkit.compress(base, models, dataclasses.replace(codec, shrink=0.5))
    for task, factor in (("a", 1.0), ("b", 1 / 1.6), ("c", 0.5)):
        for name in base:
            delta, wanted = shrunk.delta(task, name), plain.delta(task, name)
            assert delta is not None
            assert wanted is not None
            assert torch.allclose(delta, factor * wanted, rtol=1e-5), (task, name)


def test_a_trace_norm_is_the_sum_of_the_singular_values() -> None:
    base = {"w": torch.zeros(20, 10), "x": torch.zeros(10, 10)}
    flat = {"w": torch.eye(20, 10), "x": 2 * torch.eye(10)}  # 10 + 20
    steep = {"w": torch.zeros(20, 10), "x": torch.zeros(10, 10)}
    steep["x"][0, 3] = 40.0
    bundle = fusionkit.compress(base, {"a": flat, "b": steep}, DARE(0.0, shrink=0.1, dtype="fp32"))
    delta = bundle.delta("b", "x")
    assert delta is not None
    assert float(delta[0, 3]) == pytest.approx(40 * 30 / 40)


def test_a_task_that_is_added_is_shrunk_as_among_the_others(tmp_path: Path) -> None:
    base = {"w": torch.zeros(30, 20)}
    first = torch.randn(30, 20)
    models = {"a": {"w": first}, "b": {"w": 1.25 * first}}
    codec = DARE(0.5, shrink=0.5, dtype="fp32")
    whole = fusionkit.compress(base, models, codec)
    bundle = fusionkit.compress(base, {"a": models["a"]}, codec, tmp_path / "b")
    with pytest.raises(BundleError, match="share"):
        fusionkit.add_tasks(bundle, {"b": models["b"]})
    fusionkit.add_tasks(bundle, {"b": models["b"]}, keep_shared=True)
    added, wanted = bundle.delta("b", "w"), whole.delta("b", "w")
    assert added is not None
    assert wanted is not None
    assert torch.equal(added, wanted)


@pytest.mark.parametrize("merge", [None, TaskArithmetic(0.4), TIES(density=0.5)], ids=repr)
def test_before_a_merge_it_is_the_merge_of_what_it_leaves(merge: fusionkit.Merge | None) -> None:
    """The same as that merge over checkpoints that were dropped from by hand."""
    arguments = models()
    found = DAREMerge(merge, drop=0.6, seed=5)
    merge_tensor = found.prepare(family := Family(**arguments))
    base = arguments["base"]
    dropped = {
        task: {
            name: base[name]
            + (state[name] - base[name])
            * kept(key_of(5, task, name), base[name].numel(), 0.6, CPU).view(base[name].shape)
            / 0.4
            if name in base and name not in ("head.weight", "decoder")
            else tensor
            for name, tensor in state.items()
        }
        for task, state in arguments["finetuned"].items()
    }
    for state in dropped.values():
        state["decoder"] = state["embedding"]
    by_hand = Family(base, dropped, arguments["private"])
    plain = merge or Mean()
    wanted_tensor = plain.prepare(by_hand)
    for each, other in zip(family, by_hand, strict=True):
        assert torch.allclose(merge_tensor(each), wanted_tensor(other), atol=2e-6), each.name


@pytest.mark.parametrize("drop", [1.0, -0.1])
def test_a_bad_probability_is_refused(drop: float) -> None:
    with pytest.raises(CodecError, match=r"drop in \[0, 1\), got"):
        DARE(drop)
    with pytest.raises(CodecError, match=r"DAREMerge's drop in"):
        DAREMerge(drop=drop)


@pytest.mark.parametrize(("drop", "spread"), [(0.9, 0.1), (0.1, 0.2), (0.5, -0.1)])
def test_a_spread_that_leaves_the_range_is_refused(drop: float, spread: float) -> None:
    with pytest.raises(CodecError, match=rf"drop ± spread in \[0, 1\), got {drop} ± {spread}"):
        DARE(drop, spread=spread)


@pytest.mark.parametrize("shrink", [0.0, 1.5])
def test_a_bad_shrink_is_refused(shrink: float) -> None:
    with pytest.raises(CodecError, match=rf"shrink in \(0, 1\], got {shrink}"):
        DARE(shrink=shrink)
