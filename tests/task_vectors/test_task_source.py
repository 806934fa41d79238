"""The loop that writes weights: the same of a bundle, a family and a fusion, re-derived by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_net import TinyNet, perturbed
from torch import Tensor, nn

import fusionkit
from fusionkit import Dense, Family, MagnitudePrune, Mean, TaskArithmetic
from fusionkit.errors import BundleError
from fusionkit.reuse.fused import Fused
from fusionkit.reuse.module import ReuseModule
from fusionkit.task_vectors.task_source import TaskSource, write_weights, written

PRIVATE, FROZEN = ["head.*"], ["conv.*"]
EXACT = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
DELTAS = ("embed.weight", "norm.weight", "norm.bias", "hidden.weight", "hidden.bias")
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


class InTurn(dict[str, Tensor]):
    """Tensors to write into; each must be written before another is asked for, and just once."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.check()
        assert name not in self.asked
        self.asked.append(name)
        return super().__getitem__(name)

    def check(self) -> None:
        for name in self.asked:
            assert not super().__getitem__(name).isnan().any(), name


def blank(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_floating_point():
        return torch.full(tensor.shape, torch.nan, dtype=dtype)
    return torch.full_like(tensor, -1)


@given(seed=st.integers(0, 99), of_base=DTYPES, of_model=DTYPES, scale=st.sampled_from([1.0, 0.3]))
@settings(max_examples=20, deadline=None)
def test_base_plus_delta_is_written_rounded_once(
    seed: int, of_base: torch.dtype, of_model: torch.dtype, scale: float
) -> None:
    torch.manual_seed(seed)
    net = TinyNet().eval()
    base = {n: t.to(of_base) if t.is_floating_point() else t for n, t in net.state_dict().items()}
    base["decoder.weight"] = base["embed.weight"]
    tuned: Any = {t: perturbed(net, seed=p, classes=2) for p, t in enumerate(("ant", "bee"))}
    for state in tuned.values():
        state.update({name: base[name] for name in base if name.startswith("conv.")})
    family = Family(base, tuned, PRIVATE, FROZEN)
    bundle = fusionkit.compress(base, tuned, MagnitudePrune(0.3), private=PRIVATE, frozen=FROZEN)
    fused = Fused(family, TaskArithmetic(1.0))
    fused.scale = scale

    def of_family(name: str) -> Tensor:
        return tuned["bee"][name]

    def of_bundle(name: str) -> Tensor:
        delta = bundle.delta("bee", name)
        return base[name].float() + (0 if delta is None else delta)

    def of_fusion(name: str) -> Tensor:
        total = sum(state[name].float() - base[name].float() for state in tuned.values())
        return base[name].float() + total * scale

    sources: list[tuple[TaskSource, Any]] = [
        (family, of_family),
        (bundle, of_bundle),
        (fused, of_fusion),
    ]
    for source, wanted in sources:
        names = {n for n in base if not n.startswith("head")}
        out = InTurn({name: blank(base[name], of_model) for name in names})
        write_weights(source, "bee", base, out)
        out.check()
        assert set(out.asked) == set(written(source)) == {*EXACT, *DELTAS}
        for name in DELTAS:
            assert torch.equal(dict.__getitem__(out, name), wanted(name).to(of_model)), name
        for name in EXACT:
            exact = tuned["bee"][name]
            target = of_model if exact.is_floating_point() else exact.dtype
            assert torch.equal(dict.__getitem__(out, name), exact.to(target)), name


class Counting(nn.Module):
    """A buffer that one kind of the model saves, and the other does not."""

    def __init__(self, saved: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("seen", torch.tensor(0), persistent=saved)


def sources() -> dict[str, Any]:
    torch.manual_seed(0)
    base = dict(Counting(saved=True).state_dict())
    moved = {n: t + 1 if n == "seen" else t + 0.5 for n, t in base.items()}
    same = {**moved, "seen": base["seen"]}
    tuned: Any = {"moved": moved, "same": same}
    family = Family(base, tuned)
    bundle = fusionkit.compress(base, tuned, Dense("fp32"))
    return {"base": base, "family": family, "bundle": bundle, "fused": Fused(family, Mean())}


@pytest.mark.parametrize("kind", ["family", "bundle", "fused"])
def test_an_exact_tensor_without_a_place_is_never_dropped(kind: str) -> None:
    found = sources()
    model = Counting(saved=False)
    base = {name: tensor for name, tensor in found["base"].items() if name != "seen"}
    model.load_state_dict(base)
    module = ReuseModule(model)
    module.reuse(found[kind])
    module.switch("same")
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(not torch.equal(tensor, base[name]) for name, tensor in after.items())
    with pytest.raises(BundleError, match=r"'moved' changes 'seen', .*no place.*persistent"):
        module.switch("moved")
    assert module.task is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, base[name])


def test_the_version_tells_that_tasks_came_or_went(tmp_path: Path) -> None:
    base = {"w": torch.zeros(4)}
    tuned: Any = {task: {"w": torch.randn(4)} for task in ("a", "b")}
    bundle = fusionkit.compress(base, tuned, Dense("fp32"), tmp_path / "b")
    seen = [bundle.version]
    bundle.delta("a", "w")
    bundle.state_dict("b")
    assert bundle.version == seen[0]
    bundle.remove("a")
    seen.append(bundle.version)
    fusionkit.add_tasks(bundle, {"a": tuned["b"]})
    seen.append(bundle.version)
    assert len(set(seen)) == 3
    fused = Fused(Family(base, tuned), Mean())
    before = fused.version
    fused.scale = 0.5
    assert fused.version != before
