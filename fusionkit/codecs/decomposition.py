"""Singular value decompositions that codecs cut matrices by; of a product, without forming it.

A tensor of more than two axes counts as the matrix (first axis) × (all others).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank

_OVERSAMPLE = 32


_ITERATIONS = 4
_BLOCK = 1 << 14
"""Columns that are made float64 at once."""
SMALL = 1e-20
"""A sum of squares below it may lack what is smaller than float32's smallest."""
_PIECE = 1 << 17
"""Entries that are squared at once."""


class Spectral(NamedTuple):
    """A singular value decomposition, δ = U diag(σ) Vᵀ.

    Attributes:
        u: `(rows, k)`, orthonormal columns.
        s: `(k,)`, descending.
        v: `(columns, k)`, orthonormal columns.
    """

    u: Tensor
    s: Tensor
    v: Tensor

    def first(self, rank: int) -> "Spectral":
        """The leading directions alone."""
        return Spectral(self.u[:, :rank], self.s[:rank], self.v[:, :rank])

    def cut(self, rank: int) -> "LowRank":
        """The leading directions; √σ goes to either side, so that both sit well in fp16."""
        root = self.s[:rank].sqrt()
        return LowRank(self.u[:, :rank] * root, self.v[:, :rank] * root)


def matrix_of(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of the matrix that a tensor counts as; a vector is of one row."""
    if len(shape) < 2 or shape.numel() == 0:
        return 1, shape.numel()
    return shape[0], shape.numel() // shape[0]


def energy(values: Tensor) -> float:
    """The sum of squares, of float32 in pieces that stay in the cache, and of these in float64."""
    flat = torch.split(values.reshape(-1), _PIECE)
    total = float(torch.stack([piece.square().sum() for piece in flat]).sum(dtype=torch.float64))
    if SMALL < total < math.inf:
        return total
    # Squares beyond float32's range, at either end.
    return sum(float(piece.to(torch.float64).square_().sum()) for piece in flat)


def squared_singular_values(matrix: Tensor) -> Tensor:
    """All of them, float64, descending, by the smaller Gram matrix: at half of `svd_gram`'s price.

    Their error is 1e-16 of the largest.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    gram = torch.zeros(len(wide), len(wide), dtype=torch.float64, device=matrix.device)
    for start in range(0, wide.shape[1], _BLOCK):
        double = wide[:, start : start + _BLOCK].to(torch.float64)
        gram.addmm_(double, double.mT)
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.flip(0).clamp_(min=0)


def svd_product(product: LowRank) -> Spectral:
    """SVD of a product, without forming it: QR of either factor, SVD of the r × r core."""
    q_left, r_left = torch.linalg.qr(product.left)
    q_right, r_right = torch.linalg.qr(product.right)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return Spectral(q_left @ u, s, q_right @ vh.mT)


def svd_exact(matrix: Tensor, rank: int) -> Spectral:
    """LAPACK's SVD of a float32 `(rows, columns)`; all directions."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return Spectral(u, s, vh.mT)


def svd_gram(matrix: Tensor, rank: int) -> Spectral:
    """SVD through the smaller Gram matrix in float64; all directions.

    The squaring costs digits of singular values below 1e-8 of the largest only.
    """
    if matrix.shape[0] > matrix.shape[1]:
        v, s, u = svd_gram(matrix.mT, rank)
        return Spectral(u, s, v)
    double = matrix.to(torch.float64)
    squares, vectors = torch.linalg.eigh(double @ double.mT)
    u = vectors.flip(1)
    s = squares.flip(0).clamp_(min=0).sqrt()
    v = (double.mT @ u) / torch.where(s > 0, s, 1.0)
    return Spectral(u.to(matrix.dtype), s.to(matrix.dtype), v.to(matrix.dtype))


def svd_randomized(matrix: Tensor, rank: int, iterations: int = _ITERATIONS) -> Spectral:
    """Subspace iteration from a fixed seed (Halko et al., 0909.4061); the leading `rank` only."""
    columns = min(rank + max(_OVERSAMPLE, math.ceil(rank / 2)), *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return Spectral((basis @ u)[:, :rank], s[:rank], vh.mT[:, :rank])
