"""Finite values that a dtype can't hold are refused wherever weights are written."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusionkit
from fusionkit import ReuseModule
from fusionkit.bundles.export_model import export_task
from fusionkit.checkpoints.rounding import lost, narrows, rounded
from fusionkit.errors import BundleError, CodecError, FamilyError

HALF = torch.float16


@pytest.mark.parametrize(
    ("source", "target", "wanted"),
    [
        (torch.bfloat16, HALF, True),
        (torch.float32, HALF, True),
        (HALF, torch.float8_e4m3fn, True),
        (torch.float32, torch.bfloat16, False),
        (HALF, torch.float32, False),
        (HALF, HALF, False),
        (torch.int64, HALF, False),
    ],
)
def test_which_dtypes_have_less_range(
    source: torch.dtype, target: torch.dtype, wanted: bool
) -> None:
    assert narrows(source, target) == wanted


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(65504.0, 0), (65519.0, 0), (65520.0, 65520), (-7e4, 7e4), (math.inf, 0), (math.nan, 0)],
)
def test_only_what_was_finite_is_lost(value: float, wanted: float) -> None:
    values = torch.tensor([1.0, value, 2.0])
    assert float(lost(values, HALF)) == wanted
    if wanted:
        with pytest.raises(
            BundleError, match=f"x reaches {abs(value):g}, .* in float16; .*bf16 or"
        ):
            rounded(values, HALF, "x")
    else:
        assert torch.equal(rounded(values, HALF, "x").nan_to_num(0), values.half().nan_to_num(0))


def test_bfloat16_is_not_offered_where_it_overflows_too() -> None:
    with pytest.raises(BundleError, match=r"in fp32$"):
        rounded(torch.tensor([3.4e38]), HALF, "x")


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 2, bias=False)
        self.to(dtype)


def large(model: nn.Module, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    state = {n: t.to(dtype, copy=True) for n, t in model.state_dict().items()}
    state[name].view(-1)[3] = 70000
    return state


@pytest.mark.parametrize("codec", [fusionkit.Dense("bf16"), fusionkit.EMR(), fusionkit.SVD(rank=4)])
def test_a_fine_tune_beyond_the_bases_range_is_refused_when_it_is_compressed(
    codec: fusionkit.DeltaCodec,
) -> None:
    base, tuned = Net(HALF), large(Net(), "inner.weight", torch.bfloat16)
    said = (
        r"'inner.weight' reaches 70144 \(task 'a'\).* float16; convert the base .* to bf16 or fp32"
    )
    with pytest.raises(FamilyError, match=said):
        fusionkit.compress(base, {"a": tuned}, codec)
    # followed, and for the payload as well where it is float16 itself
    wide = {name: tensor.to(torch.bfloat16) for name, tensor in base.state_dict().items()}
    codec = (
        fusionkit.Dense("fp32")
        if isinstance(codec, fusionkit.Dense)
        else fusionkit.SVD(rank=4, dtype="fp32")
    )
    state = fusionkit.compress(wide, {"a": tuned}, codec).state_dict("a")
    torch.testing.assert_close(state["inner.weight"], tuned["inner.weight"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["inner.weight", "head.weight"])
def test_an_export_in_float16_is_refused(tmp_path: Path, name: str) -> None:
    base, tuned = Net(), large(Net(), name, torch.float32)
    bundle = fusionkit.compress(
        base, {"a": tuned}, fusionkit.Dense("fp32"), tmp_path / "bundle", private=["head.*"]
    )
    out = tmp_path / "a.safetensors"
    said = rf"{re.escape(str(bundle.path))}: task 'a': tensor '{name}' reaches 70000, .* float16"
    with pytest.raises(BundleError, match=said):
        export_task(bundle, "a", out, dtype="fp16")
    assert not out.exists()
    export_task(bundle, "a", out, dtype="bf16")
    assert torch.isfinite(fusionkit.Checkpoint.of(out)[name]).all()


def test_a_frozen_tensor_of_the_base_is_looked_at_as_well() -> None:
    base = Net()
    base.load_state_dict(large(base, "head.weight", torch.float32))
    tuned = {**base.state_dict(), "inner.weight": base.inner.weight.detach() + 1}
    bundle = fusionkit.compress(base, {"a": tuned}, fusionkit.Dense(), frozen=["head.*"])
    with pytest.raises(BundleError, match=r"tensor 'head.weight' reaches 70000"):
        bundle.state_dict("a", HALF)


@pytest.mark.parametrize("name", ["inner.weight", "head.weight"])
@pytest.mark.parametrize("compressed", [True, False])
def test_a_switch_of_a_model_in_float16_is_refused(name: str, compressed: bool) -> None:
    base, tuned = Net(), large(Net(), name, torch.float32)
    codec = fusionkit.Dense("fp32") if compressed else None
    module = ReuseModule(base, codec=codec, finetuned={"a": tuned}, private=["head.*"])  # type: ignore[dict-item]
    module.switch("a")
    module.half()
    before = {n: t.clone() for n, t in Net().half().state_dict().items()}
    with pytest.raises(BundleError, match=rf"task 'a': tensor '{name}' reaches 70000.*in bf16 or"):
        module.switch("a")
    assert all(torch.equal(before[n], t) for n, t in base.state_dict().items())
    module.to(torch.bfloat16)  # followed
    module.switch("a")
    assert torch.equal(base.state_dict()[name], tuned[name].bfloat16())


def test_infinities_that_are_meant_are_written_into_float16() -> None:
    base = {"w": torch.randn(4), "mask": torch.full((4,), -math.inf)}
    tuned = {"w": base["w"] + 1, "mask": base["mask"]}
    bundle = fusionkit.compress(base, {"a": tuned}, fusionkit.Dense("fp32"))
    assert torch.equal(bundle.state_dict("a", HALF)["mask"], base["mask"].half())


def test_a_payload_that_overflows_names_the_tensor_and_the_task(tmp_path: Path) -> None:
    base = {"v": torch.zeros(4), "w": torch.zeros(4)}
    small = {"v": torch.ones(4), "w": torch.ones(4)}
    big = {**small, "w": torch.full((4,), 1e5)}
    for codec in (fusionkit.Dense("fp16"), fusionkit.EMR(), fusionkit.MagnitudePrune(0.5)):
        said = (
            r"tensor 'w', moved most by task 'b' \(.*\): a value of magnitude 1e\+05 does not fit "
            r"into fp16; store the values in bf16 or fp32"
        )
        with pytest.raises(CodecError, match=said):
            fusionkit.compress(base, {"a": small, "b": big}, codec)
        for dtype in ("bf16", "fp32"):
            followed = dataclasses.replace(codec, dtype=dtype)
            state = fusionkit.compress(base, {"a": small, "b": big}, followed).state_dict("b")
            assert state["w"].isfinite().all()
            assert state["w"].amax() > 9e4


def test_what_an_adapter_makes_too_large_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = Net(HALF)
    with torch.no_grad():
        base.inner.weight.fill_(60000)
    whole = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    peft = get_peft_model(Net(), LoraConfig(target_modules=["inner"], r=1, lora_alpha=1))
    for name, tensor in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.constant_(tensor, 100.0)
    peft.save_pretrained(str(tmp_path))
    bundle = fusionkit.compress(whole, {"a": tmp_path}, fusionkit.SVD(rank=1))
    said = r"task 'a': tensor 'inner.weight' reaches 70000, .* float16; .* in bf16 or fp32"
    with pytest.raises(BundleError, match=said):
        bundle.state_dict("a")
    assert bundle.state_dict("a", torch.bfloat16)["inner.weight"].float().amax() == 70144
    family = fusionkit.Family(whole, {"a": tmp_path})
    said = r"'inner.weight', merged, reaches 70000, .*; give the base in bf16 or fp32"
    with pytest.raises(BundleError, match=said):
        family.tensor("a", "inner.weight", whole["inner.weight"])
    wide = {name: tensor.to(torch.bfloat16) for name, tensor in whole.items()}
    assert (
        fusionkit.Family(wide, {"a": tmp_path})
        .tensor("a", "inner.weight", wide["inner.weight"])
        .isfinite()
        .all()
    )
