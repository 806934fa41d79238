"""Entries that are no finite numbers: no delta where base and fine-tune agree, else refused."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fusionkit
from fusionkit import registry
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import FamilyError
from fusionkit.task_vectors.vectors import difference

LIMIT = 2.0**110
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INF = math.inf
DIFFERENT = [(-INF, INF), (-INF, math.nan), (0.0, math.nan)]


def lossless() -> DeltaCodec:
    made: DeltaCodec = registry.load("fusionkit.codecs", "lossless")()
    return made


CODECS = [
    fusionkit.Dense("fp16"),
    fusionkit.EMR(),
    fusionkit.SVD(rank=2),
    fusionkit.MagnitudePrune(0.5),
    fusionkit.DBMS(fusionkit.SVD(rank=2)),
    fusionkit.Merged(fusionkit.TIES()),
    lossless(),
]


def masked(dtype: torch.dtype) -> dict[str, Tensor]:
    """A base with a causal mask, observers that have seen nothing, and a NaN that is meant."""
    torch.manual_seed(0)
    return {
        "w": torch.randn(8, 8).to(dtype),
        "mask": torch.triu(torch.full((8, 8), -INF), 1).to(dtype),
        "observer": torch.tensor([INF, -INF, math.nan, 1.0]).to(dtype),
    }


def moved(base: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {**{name: t.to(dtype) for name, t in base.items()}, "w": (base["w"] + 0.25).to(dtype)}


@pytest.mark.parametrize("of_tuned", DTYPES)
@pytest.mark.parametrize("of_base", DTYPES)
def test_what_is_not_finite_in_both_is_no_delta(
    tmp_path: Path, of_base: torch.dtype, of_tuned: torch.dtype
) -> None:
    base = masked(of_base)
    tuned = {**moved(base, of_tuned), "observer": torch.tensor([INF, -INF, math.nan, 2.0])}
    tuned["observer"] = tuned["observer"].to(of_tuned)
    save_file(tuned, tmp_path / "tuned.safetensors")
    family = fusionkit.Family(base, {"live": tuned, "file": tmp_path / "tuned.safetensors"})
    wanted = torch.tensor([0.0, 0.0, 0.0, 1.0])
    for vectors in family:
        for task in range(2):
            assert torch.isfinite(vectors[task]).all()
        blocks = torch.cat([block.clone() for _, block in vectors.blocks(3)], 1)
        assert torch.equal(blocks, vectors.stack().view(2, -1))
    assert torch.equal(family.vectors("observer")[0], wanted)
    assert not family.vectors("mask")[1].any()
    assert torch.equal(difference(tuned["observer"], base["observer"]), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_every_codec_gives_it_back(codec: DeltaCodec, dtype: torch.dtype) -> None:
    base = masked(dtype)
    tuned = moved(base, dtype)
    bundle = fusionkit.compress(base, {"a": tuned, "b": moved(tuned, dtype)}, codec)
    state = bundle.state_dict("a")
    assert torch.equal(state["mask"], base["mask"])
    assert torch.equal(state["observer"].nan_to_num(7.0), base["observer"].nan_to_num(7.0))
    assert torch.isfinite(state["w"]).all()
    for name in ("mask", "observer"):
        delta = bundle.delta("a", name)
        assert delta is None or not delta.any()


@pytest.mark.parametrize(
    ("codec", "ours", "theirs"),
    [
        (fusionkit.Dense("fp16"), INF, 0.5),  # Lossless has it to the bit
        *((fusionkit.Dense("fp16"), *pair) for pair in DIFFERENT),
        *((lossless(), *pair) for pair in DIFFERENT),
    ],
    ids=repr,
)
def test_what_differs_is_refused_and_private_is_a_mend(
    codec: DeltaCodec, ours: float, theirs: float
) -> None:
    base = {"w": torch.randn(4, 4), "m": torch.tensor([1.0, ours])}
    tuned = {"w": base["w"] + 1, "m": torch.tensor([1.0, theirs])}
    with pytest.raises(FamilyError, match=r"'m' holds 1 values .*\(task 'a'\).*declare 'm' privat"):
        fusionkit.compress(base, {"a": tuned}, codec)
    state = fusionkit.compress(base, {"a": tuned}, codec, private=["m"]).state_dict("a")
    assert torch.equal(state["m"].nan_to_num(7.0), tuned["m"].nan_to_num(7.0))


def test_a_matrix_of_a_stack_is_called_by_the_stack() -> None:
    base = {"mlp.experts.up": torch.zeros(2, 3, 3)}
    tuned = {"mlp.experts.up": torch.full((2, 3, 3), INF)}
    with pytest.raises(FamilyError, match=r"'mlp.experts.up\[0\]' .*declare 'mlp.experts.up' priv"):
        fusionkit.compress(base, {"a": tuned}, fusionkit.Dense())
    bundle = fusionkit.compress(base, {"a": tuned}, fusionkit.Dense(), private=["mlp.experts.up"])
    assert torch.equal(bundle.state_dict("a")["mlp.experts.up"], tuned["mlp.experts.up"])


def test_a_difference_beyond_float32_is_refused_and_private_is_a_mend() -> None:
    base = {"w": torch.randn(4), "m": torch.tensor([-3e38])}
    tuned = {"w": base["w"] + 1, "m": torch.tensor([3e38])}
    with pytest.raises(FamilyError, match=r"float32 has room to add up .*declare 'm' private"):
        fusionkit.compress(base, {"a": tuned}, fusionkit.Dense())
    state = fusionkit.compress(base, {"a": tuned}, fusionkit.Dense(), private=["m"]).state_dict("a")
    assert torch.equal(state["m"], tuned["m"])


def test_a_frozen_tensor_may_hold_what_is_no_number() -> None:
    base = masked(torch.float32)
    family = fusionkit.Family(base, {"a": moved(base, torch.bfloat16)}, frozen=["mask", "observer"])
    family.check_frozen()


@pytest.mark.parametrize("of_tuned", [torch.float32, torch.bfloat16, torch.float64])
def test_a_difference_must_leave_room_for_sums(of_tuned: torch.dtype) -> None:
    """Half of what is refused, of 200 tasks, can be added up."""
    base, most = {"m": torch.zeros(5)}, torch.tensor([0.0, LIMIT / 2, -LIMIT / 2, 0, 1])
    tuned = {f"t{place}": {"m": most.to(of_tuned)} for place in range(200)}
    for codec in (
        fusionkit.EMR(dtype="fp32"),
        fusionkit.Merged(fusionkit.TaskArithmetic(1.0), "int4"),
    ):
        delta = fusionkit.compress(base, tuned, codec).delta("t7", "m")
        assert delta is not None
        assert delta.isfinite().all()
    tuned["t7"] = {"m": 2 * most.to(of_tuned)}
    text = r"'m' differs from the base's by up to 1.3e\+33, .*room to add up \(task 't7'\)"
    with pytest.raises(FamilyError, match=text):
        fusionkit.compress(base, tuned, fusionkit.EMR())
