"""Factors as integers: fitted to each other in closed form, and never the worse for it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs.decomposition import svd_exact
from fusionkit.codecs.stored_factors import pack_factors, unpack_factors
from fusionkit.codecs.values import ValueDtype, pack_values, unpack_values

INTEGERS: tuple[ValueDtype, ...] = ("int8", "int4", "int3", "int2")


def rounded(values: Tensor, dtype: ValueDtype) -> Tensor:
    return unpack_values(pack_values(values, dtype), len(values), dtype)


def error(delta: Tensor, left: Tensor, right: Tensor) -> float:
    return float((delta.double() - left.double() @ right.double().T).norm())


def stored(delta: Tensor | LowRank, factors: LowRank, dtype: ValueDtype) -> LowRank:
    shape = torch.Size((len(factors.left), len(factors.right)))
    return unpack_factors(pack_factors(delta, factors, dtype), shape, dtype)


def halves(rows: int, columns: int, seed: int) -> Tensor:
    """Values that int3 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-4, 4, (rows, columns), generator=generator) + 0.5
    values[0] = 3.5
    return values


def test_a_wrong_partner_is_made_right() -> None:
    """δ = L Rᵀ in representable values; R's columns are not orthogonal, so (RᵀR)⁻¹ matters."""
    left, right = halves(40, 3, 0), halves(30, 3, 1)
    found = stored(left @ right.T, LowRank(torch.randn(40, 3), right), "int3")
    assert torch.equal(found.left, left)
    assert torch.equal(found.right, right)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("product", [False, True])
def test_each_is_the_least_squares_partner_of_the_other(product: bool, dtype: ValueDtype) -> None:
    """U′ = argmin ‖δ − U V̂ᵀ‖, rounded; then V′ = argmin ‖δ − Û Vᵀ‖, rounded; by `lstsq`."""
    whole = LowRank(torch.randn(50, 9), torch.randn(35, 9))
    delta = whole.dense(torch.Size((50, 35)))
    factors = svd_exact(delta, 6).cut(6)
    left, right = (rounded(each, dtype).double() for each in factors)
    fitted = rounded(torch.linalg.lstsq(right, delta.double().T).solution.T.float(), dtype)
    if error(delta, fitted, right) < error(delta, left, right):
        left = fitted.double()
    fitted = rounded(torch.linalg.lstsq(left, delta.double()).solution.T.float(), dtype)
    if error(delta, left, fitted) < error(delta, left, right):
        right = fitted.double()
    found = stored(whole if product else delta, factors, dtype)
    # A value halfway between two levels may fall either way.
    for one, other in zip(found, (left, right), strict=True):
        assert (one != other.float()).float().mean() < 0.01
    assert error(delta, *found) == pytest.approx(error(delta, left, right), rel=1e-3)
    if dtype != "int8":
        plain = error(delta, *(rounded(each, dtype) for each in factors))
        assert error(delta, *found) < 0.999 * plain


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(2, 60),
    columns=st.integers(2, 60),
    rank=st.integers(1, 12),
    own=st.integers(1, 20),
    magnitude=st.sampled_from([1e-12, 1.0, 1e12]),
    dtype=st.sampled_from(INTEGERS),
    seed=st.integers(0, 99),
)
def test_the_error_is_never_larger_than_without_refit(
    rows: int, columns: int, rank: int, own: int, magnitude: float, dtype: ValueDtype, seed: int
) -> None:
    """Also where the rank is larger than the matrix has, and columns are alike or zero."""
    generator = torch.Generator().manual_seed(seed)
    whole = LowRank(
        torch.randn(rows, own, generator=generator) * magnitude,
        torch.randn(columns, own, generator=generator).round(),
    )
    delta = whole.dense(torch.Size((rows, columns)))
    factors = svd_exact(delta, rank).cut(min(rank, rows, columns))
    plain = error(delta, *(rounded(each, dtype) for each in factors))
    for source in (delta, whole):
        found = stored(source, factors, dtype)
        assert error(delta, *found) <= plain * (1 + 1e-5) + 1e-6 * float(delta.norm())


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_floats_are_only_cast(dtype: ValueDtype) -> None:
    factors = LowRank(torch.randn(9, 2), torch.randn(7, 2))
    parts = pack_factors(torch.randn(9, 7), factors, dtype)
    for name, values in factors._asdict().items():
        assert torch.equal(parts[name], pack_values(values, dtype)["values"])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_the_stored_bytes_are_those_of_the_factors(dtype: ValueDtype) -> None:
    factors = LowRank(torch.randn(9, 2), torch.randn(7, 2))
    parts = pack_factors(torch.randn(9, 7), factors, dtype)
    for name, values in factors._asdict().items():
        for part, tensor in pack_values(values, dtype, name).items():
            assert (parts[part].shape, parts[part].dtype) == (tensor.shape, tensor.dtype)
