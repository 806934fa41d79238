"""Truncated SVD of each matrix delta (PERU-LoRA's cut, 2310.01886; TSV-Compress' truncation)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusionkit.codec import Parts, TensorCodec
from fusionkit.errors import CodecError
from fusionkit.values import ValueDtype, pack_values, unpack_values

_GRAM_LIMIT = 2048
_OVERSAMPLE = 32
_ITERATIONS = 4


@dataclass(frozen=True)
class SVD(TensorCodec):
    """Keep the leading singular directions of each matrix: δ ≈ U_r Σ_r V_rᵀ.

    A tensor of more than two axes counts as the matrix (first axis) × (all others). Vectors, and
    matrices whose factors would be larger than they are, are kept whole. The factors U √Σ and
    V √Σ are stored, alike in scale, so that both sit well in fp16 or in columns of integers.

    Exactly one of rank, energy and ratio is given.

    Args:
        rank: number of singular directions.
        energy: the fewest directions that hold this share of ‖δ‖², in (0, 1].
        ratio: share of the full rank, in (0, 1]; at least one direction.
        method: `exact`: LAPACK's SVD. `gram`: eigenvectors of the smaller Gram matrix in float64;
            the error is the optimal one to within 1e-5 of ‖δ‖. `randomized`: subspace iteration
            (Halko et al., 0909.4061) from a fixed seed; the error is at most 1% above the
            optimal one on deltas of real fine-tunes, whose spectra decay slowly. `auto`: gram up
            to 2048 rows or columns, or where an energy needs the whole spectrum; else
            randomized.
        vectors: keep tensors of one axis `whole`, or `drop` their deltas.
        dtype: how the factors' and vectors' values are stored (integers: a scale per column).

    Raises:
        CodecError: not exactly one of rank, energy and ratio is given, or it is out of range.
    """

    id: ClassVar[str] = "svd"
    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    method: Literal["auto", "exact", "gram", "randomized"] = "auto"
    vectors: Literal["whole", "drop"] = "whole"
    dtype: ValueDtype = "fp16"

    def __post_init__(self) -> None:
        given = {k: getattr(self, k) for k in ("rank", "energy", "ratio")}
        given = {k: v for k, v in given.items() if v is not None}
        if len(given) != 1:
            raise CodecError(
                f"expected exactly one of SVD's rank, energy, ratio; got {given or 'none'}"
            )
        if self.rank is not None and self.rank < 1:
            raise CodecError(f"expected SVD's rank to be at least 1, got {self.rank}")
        for name in ("energy", "ratio"):
            if name in given and not 0 < given[name] <= 1:
                raise CodecError(f"expected SVD's {name} in (0, 1], got {given[name]}")
        if self.energy is not None and self.method == "randomized":
            raise CodecError("SVD's energy needs the whole spectrum: use method gram or exact")

    def encode_tensor(self, delta: Tensor, name: str) -> Parts:
        """Factors of a matrix, or the values of a vector; none where the delta is zero."""
        if not delta.any() or (delta.ndim < 2 and self.vectors == "drop"):
            return {}
        rows = delta.shape[0] if delta.ndim else 1
        columns = delta.numel() // rows
        if delta.ndim >= 2 and min(rows, columns) > 1:
            left, right = self._factors(delta.reshape(rows, columns))
            if left.numel() + right.numel() < delta.numel():
                return {
                    **pack_values(left, self.dtype, "left"),
                    **pack_values(right, self.dtype, "right"),
                }
        return pack_values(delta.reshape(-1), self.dtype)

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """U_r Σ_r V_rᵀ in the tensor's shape."""
        if "values" in parts:
            return unpack_values(parts, shape.numel(), self.dtype).view(shape)
        left = unpack_values(parts, shape[0], self.dtype, "left")
        right = unpack_values(parts, shape.numel() // shape[0], self.dtype, "right")
        return (left @ right.T).view(shape)

    def _factors(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        full = min(matrix.shape)
        rank = self.rank if self.rank is not None else round((self.ratio or 1.0) * full)
        rank = min(max(rank, 1), full)
        method = self.method
        if method == "auto":
            small = full <= _GRAM_LIMIT or self.energy is not None or 4 * rank > full
            method = "gram" if small else "randomized"
        u, s, v = _METHODS[method](matrix, rank)
        if self.energy is not None:
            held = torch.cumsum(s.to(torch.float64).square(), 0)
            rank = int(torch.searchsorted(held, self.energy * held[-1] * (1 - 1e-12))) + 1
        root = s[:rank].sqrt()
        return u[:, :rank] * root, v[:, :rank] * root


def svd_exact(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """LAPACK's SVD: float32 `(m, n)` → U `(m, full)`, σ `(full,)`, V `(n, full)`."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh.mT


def svd_gram(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """SVD through the smaller Gram matrix in float64: shapes as `svd_exact`.

    The squaring costs digits of singular values below 1e-8 of the largest only.
    """
    if matrix.shape[0] > matrix.shape[1]:
        v, s, u = svd_gram(matrix.mT, rank)
        return u, s, v
    double = matrix.to(torch.float64)
    squares, vectors = torch.linalg.eigh(double @ double.mT)
    u = vectors.flip(1)
    s = squares.flip(0).clamp_(min=0).sqrt()
    v = (double.mT @ u) / torch.where(s > 0, s, 1.0)
    return u.to(matrix.dtype), s.to(matrix.dtype), v.to(matrix.dtype)


def svd_randomized(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Subspace iteration from a fixed seed: U `(m, rank)`, σ `(rank,)`, V `(n, rank)`."""
    columns = min(rank + max(_OVERSAMPLE, math.ceil(rank / 2)), *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh.mT[:, :rank]


_METHODS = {"exact": svd_exact, "gram": svd_gram, "randomized": svd_randomized}
