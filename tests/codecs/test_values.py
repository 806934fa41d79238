"""Stored values: error bounds of every dtype, bytes used, what does not fit."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionkit.codecs.values import GROUP, ValueDtype, pack_values, unpack_values
from fusionkit.errors import CodecError

DTYPES: tuple[ValueDtype, ...] = get_args(ValueDtype)
WHOLE: tuple[ValueDtype, ...] = ("int8", "int4")
HALVES: tuple[ValueDtype, ...] = ("int3", "int2")
INTEGERS = WHOLE + HALVES
UNCUT: tuple[ValueDtype, ...] = ("fp32", "fp16", "bf16", *WHOLE)
LEVELS = {"int8": 127.0, "int4": 7.0, "int3": 3.5, "int2": 1.5}
COUNTS = [0, 1, 2, 3, 127, 128, 129, 255, 1000]


def round_trip(values: Tensor, dtype: ValueDtype) -> Tensor:
    return unpack_values(pack_values(values, dtype), values.shape[0], dtype)


def bound(values: Tensor, dtype: ValueDtype) -> Tensor:
    """The largest error that each entry may have."""
    if dtype == "fp32":
        return torch.zeros_like(values)
    if dtype in INTEGERS:
        # Half a scale; the scale is the largest magnitude over the levels, rounded up to bfloat16.
        levels = LEVELS[dtype]
        if values.ndim == 2:
            return (values.abs().amax(0) / levels / 2 * 1.02).expand_as(values)
        largest = torch.cat([part.abs().max().expand(part.numel()) for part in values.split(GROUP)])
        return largest / levels / 2 * 1.02
    digits = {"fp16": 2**-11, "bf16": 2**-8}[dtype]
    return values.abs() * digits + {"fp16": 2**-25, "bf16": 0.0}[dtype]


@pytest.mark.parametrize("dtype", UNCUT)
@pytest.mark.parametrize("count", COUNTS)
def test_round_trip_within_the_bound(count: int, dtype: ValueDtype) -> None:
    values = torch.randn(count) * torch.logspace(-3, 1, max(count, 1))[:count]
    back = round_trip(values, dtype)
    assert back.dtype == torch.float32
    assert back.shape == values.shape
    if count:
        assert bool(((back - values).abs() <= bound(values, dtype)).all())


@pytest.mark.parametrize("dtype", UNCUT)
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 2), (300, 7), (0, 3), (3, 0)])
def test_columns_have_their_own_scale(shape: tuple[int, int], dtype: ValueDtype) -> None:
    values = torch.randn(shape) * torch.logspace(-4, 2, max(shape[1], 1))[: shape[1]]
    back = round_trip(values, dtype)
    assert back.shape == shape
    if values.numel():
        assert bool(((back - values).abs() <= bound(values, dtype)).all())


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=300
    ),
    st.sampled_from(WHOLE),
)
def test_an_integer_is_off_by_at_most_half_its_stored_scale(
    drawn: list[float], dtype: ValueDtype
) -> None:
    values = torch.tensor(drawn)
    parts = pack_values(values, dtype)
    scale = parts["values.scale"].to(torch.float32).repeat_interleave(GROUP)[: len(drawn)]
    error = (unpack_values(parts, len(drawn), dtype) - values).abs()
    # Below 1e-36 a scale is denormal, and so coarser than its own half.
    assert bool((error <= scale / 2 * (1 + 1e-5) + 1e-36).all())


@pytest.mark.parametrize("dtype", WHOLE)
def test_the_largest_of_a_group_does_not_clip(dtype: ValueDtype) -> None:
    values = torch.linspace(0.5, 2, 64 * GROUP)
    back = round_trip(values, dtype)
    assert bool(((back - values).abs() <= bound(values, dtype)).all())
    assert torch.equal(round_trip(-values, dtype), -back)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_come_back_as_zeros(dtype: ValueDtype) -> None:
    for shape in ((200,), (5, 3)):
        assert torch.equal(round_trip(torch.zeros(shape), dtype), torch.zeros(shape))
    # A group or column of zeros beside one that is not.
    values = torch.zeros(2 * GROUP)
    values[-1] = 1.0
    assert not round_trip(values, dtype)[:GROUP].any()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("count", [count for count in COUNTS if count])
def test_few_levels_are_odd_halves_of_the_scale(count: int, dtype: ValueDtype) -> None:
    """Each value at the level next to it, or at the last one; groups of zeros stay zeros."""
    values = torch.randn(count) * torch.logspace(-3, 1, count)
    parts = pack_values(values, dtype)
    scale = parts["values.scale"].float().repeat_interleave(GROUP)[:count]
    levels = torch.arange(-LEVELS[dtype], LEVELS[dtype] + 1)
    nearest = (scale[:, None] * levels - values[:, None]).abs().argmin(1)
    torch.testing.assert_close(unpack_values(parts, count, dtype), scale * levels[nearest])


@pytest.mark.parametrize(("dtype", "optimum"), [("int3", 0.03744), ("int2", 0.1188)])
def test_a_normal_column_is_off_by_little_more_than_the_best_uniform_levels(
    dtype: ValueDtype, optimum: float
) -> None:
    """Max (1960), table II: 8 and 4 levels of equal spacing for a normal distribution."""
    values = torch.randn(100_000, 1)
    error = float((round_trip(values, dtype) - values).square().mean())
    assert 0.97 * optimum < error < 1.03 * optimum


@pytest.mark.parametrize("dtype", HALVES)
def test_the_scale_is_that_of_least_squared_error(dtype: ValueDtype) -> None:
    """Of those tried: never worse than to keep the largest value, far better with an outlier."""
    for count, outlier in ((64, 1.0), (GROUP, 30.0), (300, 30.0)):
        values = torch.randn(count)
        values[7] = outlier * values.abs().max()
        for group, back in zip(
            values.split(GROUP), round_trip(values, dtype).split(GROUP), strict=True
        ):
            step = group.abs().max() / LEVELS[dtype]
            level = (torch.floor(group / step) + 0.5).clamp(-LEVELS[dtype], LEVELS[dtype])
            kept = (step * level - group).square().sum()
            assert (back - group).square().sum() <= kept * (1 + 2**-7)
            if outlier > 1 and group is values[:GROUP]:
                assert (back - group).square().sum() < 0.7 * kept


def test_what_pads_a_group_has_no_part_in_its_scale() -> None:
    """Nor in the bytes of others."""
    values = torch.randn(5)
    for dtype in HALVES:
        column = pack_values(values[:, None], dtype)
        assert torch.equal(pack_values(values, dtype)["values.scale"], column["values.scale"])
        assert torch.equal(pack_values(values, dtype)["values"], column["values"][:, 0])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-10, 1e10, 1e30])
def test_tiny_and_huge_values_keep_their_range(magnitude: float, dtype: ValueDtype) -> None:
    values = torch.linspace(-1, 1, 33) * magnitude
    back = round_trip(values, dtype)
    assert bool(((back - values).abs() <= bound(values, dtype)).all())
    assert back.any()


def test_fp16_refuses_what_does_not_fit_and_flushes_what_is_too_small() -> None:
    with pytest.raises(CodecError, match=r"7e\+04 does not fit into fp16; .*bf16 or fp32"):
        pack_values(torch.tensor([1.0, -7e4]), "fp16")
    assert round_trip(torch.tensor([65504.0]), "fp16").item() == 65504.0
    assert round_trip(torch.tensor([1e-30]), "fp16").item() == 0.0


@pytest.mark.parametrize("count", COUNTS)
def test_bytes_used(count: int) -> None:
    values = torch.randn(count)
    groups = -(-count // GROUP)
    wanted = {
        "fp32": 4 * count,
        "fp16": 2 * count,
        "bf16": 2 * count,
        "int8": count + 2 * groups,
        "int4": (count + 1) // 2 + 2 * groups,
        "int3": -(-3 * count // 8) + 2 * groups,
        "int2": -(-2 * count // 8) + 2 * groups,
    }
    for dtype in DTYPES:
        assert sum(part.nbytes for part in pack_values(values, dtype).values()) == wanted[dtype]


@pytest.mark.parametrize(("rows", "stored"), [(4, 2), (5, 3)])
def test_int4_packs_two_rows_a_byte_with_a_scale_per_column(rows: int, stored: int) -> None:
    parts = pack_values(torch.randn(rows, 3), "int4", "left")
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "left": (stored, 3),
        "left.scale": (3,),
    }
    assert parts["left"].dtype == torch.uint8
    assert parts["left.scale"].dtype == torch.bfloat16


def test_int4_has_the_earlier_value_in_the_low_half() -> None:
    assert pack_values(torch.tensor([7.0, -7.0, 0.0]), "int4")["values"].tolist() == [0x1F, 0x88]


def test_low_integers_are_packed_by_bits_from_the_lowest_on() -> None:
    """As int4: a code is the level's place, from the lowest level."""
    low = pack_values(torch.tensor([-1.5, -0.5, 0.5, 1.5, 1.5]), "int2")
    assert low["values"].tolist() == [0b11_10_01_00, 0b10_10_10_11]
    three = pack_values(torch.arange(-3.5, 4.5).flip(0), "int3")
    word = sum(code << (3 * place) for place, code in enumerate(range(7, -1, -1)))
    assert three["values"].tolist() == list(word.to_bytes(3, "little"))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_magnitudes_change_the_scale_alone(dtype: ValueDtype) -> None:
    values = torch.randn(300)
    one = pack_values(values, dtype)
    for power in (-60, 60):
        other = pack_values(values * 2.0**power, dtype)
        assert torch.equal(other["values"], one["values"])
        assert torch.equal(
            other["values.scale"].double(), one["values.scale"].double() * 2.0**power
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacked_values_never_share_the_payloads_memory(dtype: ValueDtype) -> None:
    parts = pack_values(torch.randn(130), dtype)
    before = {name: part.clone() for name, part in parts.items()}
    unpack_values(parts, 130, dtype).fill_(9.0)
    assert all(torch.equal(parts[name], before[name]) for name in parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_named_after_the_part(dtype: ValueDtype) -> None:
    parts = pack_values(torch.ones(3), dtype, "elected")
    assert sorted(parts) == ["elected", "elected.scale"][: 2 if dtype in INTEGERS else 1]
    assert torch.allclose(unpack_values(parts, 3, dtype, "elected"), torch.ones(3), atol=1e-2)


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(CodecError, match="unknown dtype 'fp99'; expected fp32, fp16, bf16, int8"):
        pack_values(torch.ones(3), "fp99")  # type: ignore[arg-type]
