"""Dense: every value of every delta comes back, rounded to the chosen dtype and no further."""

import pytest
import torch
from stacked import decoded, random_family, stack

import fusionkit
from fusionkit import Dense
from fusionkit.errors import CodecError

SHAPES = {"a.weight": (6, 5), "a.bias": (5,), "conv": (4, 3, 3, 3), "scale": (), "none": (0, 4)}


def test_fp32_keeps_every_bit_of_every_delta() -> None:
    base, finetuned = random_family(SHAPES, tasks=2)
    bundle = fusionkit.compress(base, finetuned, Dense("fp32"))
    for t, task in enumerate(finetuned):
        names = list(SHAPES)
        assert torch.equal(decoded(bundle, task, names), stack(base, finetuned, names)[t])
        for name, wanted in finetuned[task].items():
            found = bundle.state_dict(task)[name]
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_from_a_zero_base_it_is_lossless() -> None:
    _, finetuned = random_family(SHAPES, tasks=1, scale=3.0)
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    found = fusionkit.compress(base, finetuned, Dense("fp32")).state_dict("task0")
    for name, wanted in finetuned["task0"].items():
        assert torch.equal(found[name], wanted)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [("fp16", 2**-11), ("bf16", 2**-8), ("int8", 0.51 / 127), ("int4", 0.51 / 7)],
)
def test_rounding(dtype: str, bound: float) -> None:
    base, finetuned = random_family({"w": (33, 17)}, tasks=1)
    tau = stack(base, finetuned, ["w"])[0]
    bundle = fusionkit.compress(base, finetuned, Dense(dtype))  # type: ignore[arg-type]
    found = decoded(bundle, "task0", ["w"])
    assert 0 < (found - tau).abs().max() <= bound * tau.abs().max()


def test_a_delta_too_large_for_fp16_is_refused() -> None:
    base, tuned = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, 1e5, 0.0])}
    with pytest.raises(CodecError, match=r"1e\+05 does not fit into fp16; .* bf16 or fp32"):
        fusionkit.compress(base, {"t": tuned}, Dense())
