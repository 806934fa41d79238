"""Low-rank deltas, δ = L Rᵀ: an adapter's, or a codec's.

A tensor of more than two axes counts as the matrix (first axis) × (all others).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """A matrix as a product, δ = L Rᵀ.

    Attributes:
        left: L, float32 `(rows, r)`.
        right: R, float32 `(columns, r)`.
    """

    left: Tensor
    right: Tensor

    def dense(self, shape: torch.Size) -> Tensor:
        """The product, float32 `(*shape)`."""
        return (self.left @ self.right.T).view(shape)


def first_order(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> LowRank:
    """First-order expansion of B A at (A₀, B₀): B A₀ + B₀ (A − A₀), as a product.

    L-LoRA's closed form (Tang et al., 2310.04742, eq. 4): linear in (A, B), of rank at most 2r;
    of rank r from PEFT's usual start, B₀ = 0.

    Args:
        a: A, `(r, columns)`.
        b: B, `(rows, r)`.
        a0: where A started.
        b0: where B started.
    """
    if not b0.any():
        return LowRank(b, a0.mT)
    return LowRank(torch.cat([b, b0], 1), torch.cat([a0, a - a0]).mT)
