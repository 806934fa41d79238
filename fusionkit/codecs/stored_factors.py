"""Factors of a matrix in the dtype that they are stored in; as integers, fitted to each other.

A factor that is rounded to few bits spans other directions than it did, and the other factor can
make up for some of that: the best partner of a rounded V̂ is δ V̂ (V̂ᵀV̂)⁻¹. So U is fitted to V̂ and
rounded, then V to that Û.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs.decomposition import matrix_of
from fusionkit.codecs.layout import Layout
from fusionkit.codecs.values import ValueDtype, pack_values, unpack_values, values_layout

_INTEGERS = ("int8", "int4", "int3", "int2")
_BLOCK = 1 << 22
"""Entries that are made float64 at once."""


def pack_factors(delta: Tensor | LowRank, factors: LowRank, dtype: ValueDtype) -> dict[str, Tensor]:
    """Store factors that approximate a matrix.

    Floats are cast. Integers are fitted to the matrix, one factor given the other as it is stored,
    where that is nearer to it: they are never further from it than the factors, rounded, are.

    Args:
        delta: the matrix: float32 `(rows, columns)`, or a product.
        factors: what approximates it, alike in scale.
        dtype: how to store their values; integers have a scale for each column.

    Returns:
        the payload tensors `left` and `right`, and beside integers their scales.

    Raises:
        RangeError: a value is too large for fp16.
    """
    parts = {
        **pack_values(factors.left, dtype, "left"),
        **pack_values(factors.right, dtype, "right"),
    }
    if dtype in _INTEGERS:
        shape = torch.Size((len(factors.left), len(factors.right)))
        left, right = unpack_factors(parts, shape, dtype)
        parts |= _refitted(delta, left, right, dtype, "left")
        left, right = unpack_factors(parts, shape, dtype)
        parts |= _refitted(_transposed(delta), right, left, dtype, "right")
    return parts


def unpack_factors(parts: Mapping[str, Tensor], shape: torch.Size, dtype: ValueDtype) -> LowRank:
    """Read the factors of a tensor of this shape back, in float32.

    Raises:
        ValueError: they are not what `pack_factors` makes of such a tensor.
    """
    left = unpack_values(parts, shape[0], dtype, "left")
    right = unpack_values(parts, shape.numel() // shape[0], dtype, "right")
    if left.ndim != 2 or left.shape[1:] != right.shape[1:]:
        raise ValueError(f"factors of {tuple(left.shape)} and {tuple(right.shape)} have no product")
    return LowRank(left, right)


def factors_layout(shape: torch.Size, dtype: ValueDtype) -> Layout:
    """What `pack_factors` makes of a tensor of this shape."""
    rows, columns = matrix_of(shape)
    return {
        **values_layout((rows, None), dtype, "left"),
        **values_layout((columns, None), dtype, "right"),
    }


def _refitted(
    delta: Tensor | LowRank, own: Tensor, other: Tensor, dtype: ValueDtype, part: str
) -> dict[str, Tensor]:
    """The parts of a factor that was fitted to the other, as it is stored; none if it is worse."""
    other = other.to(torch.float64)
    product, gram = _times(delta, other), other.mT @ other
    fitted = product @ torch.linalg.pinv(gram, hermitian=True)
    parts = pack_values(fitted.to(torch.float32), dtype, part)
    again = unpack_values(parts, len(own), dtype, part)
    nearer = _error(again, product, gram) < _error(own, product, gram)
    return parts if nearer else {}


def _error(own: Tensor, product: Tensor, gram: Tensor) -> float:
    """‖δ − U Vᵀ‖² − ‖δ‖², of U, δ V and VᵀV."""
    own = own.to(torch.float64)
    return float((own.mT @ own * gram).sum() - 2 * (own * product).sum())


def _times(delta: Tensor | LowRank, other: Tensor) -> Tensor:
    """δ V in float64."""
    if isinstance(delta, LowRank):
        return delta.left.to(torch.float64) @ (delta.right.to(torch.float64).mT @ other)
    product = other.new_empty(len(delta), other.shape[1])
    rows = max(_BLOCK // delta.shape[1], 1)
    for start in range(0, len(delta), rows):
        product[start : start + rows] = delta[start : start + rows].to(torch.float64) @ other
    return product


def _transposed(delta: Tensor | LowRank) -> Tensor | LowRank:
    return LowRank(delta.right, delta.left) if isinstance(delta, LowRank) else delta.mT
