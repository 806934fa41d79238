"""Task singular vectors: what of a matrix's delta is the task's (Gargiulo et al., 2412.00081)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionkit import SVD, DeltaCodec, Encoder, Family, LowRank, Parts, SharedParts, TensorMerge
from fusionkit.codecs.decomposition import Spectral, svd_gram, svd_randomized
from fusionkit.codecs.layout import Layout
from fusionkit.codecs.values import ValueDtype
from fusionkit.errors import CodecError

_GRAM_LIMIT = 2048
"""Rows or columns up to which the Gram matrix is the fastest way to all directions."""


@dataclass(frozen=True)
class TSVCompress(DeltaCodec):
    """TSV-Compress: of each matrix, a T-th of its singular directions, T the number of tasks.

    T compressed tasks then have about as many values as one uncompressed. Vectors are kept whole.
    The error is that of the directions left out, and of rounding, as `SVD`'s is.

    Args:
        tasks: T; none: the tasks at hand. Give it where more will be added later.
        dtype: how factors and vectors are stored.

    Raises:
        CodecError: `tasks` is less than 1.
    """

    id: ClassVar[str] = "tsv"
    tasks: int | None = None
    dtype: ValueDtype = "fp16"

    def __post_init__(self) -> None:
        if self.tasks is not None and self.tasks < 1:
            raise CodecError(f"expected TSVCompress's tasks to be at least 1, got {self.tasks}")

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """Nothing: tensor by tensor, as truncated SVD at 1/T of the full rank."""
        return self._svd(self.tasks or len(family.tasks)).prepare(family, shared)

    def layout(self, shape: torch.Size) -> Layout:
        """As of truncated SVD."""
        return self._svd(1).layout(shape)

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """U_k Σ_k V_kᵀ."""
        return self._svd(1).decode(parts, shape)

    def factors(self, parts: Parts, shape: torch.Size) -> LowRank | None:
        """The factors as stored; None of a tensor that was kept whole."""
        return self._svd(1).factors(parts, shape)

    def _svd(self, tasks: int) -> SVD:
        return SVD(ratio=1 / tasks, dtype=self.dtype)


@dataclass(frozen=True)
class TSVMerge(TensorMerge):
    """TSV-Merge: the tasks' leading directions, made orthogonal to each other, in one matrix.

    Of each matrix the top rank / T directions of every task are put side by side, U = [U_1 … U_T]
    and V alike; each is replaced by the nearest matrix with orthonormal columns (Procrustes:
    U = P D Qᵀ → P Qᵀ), so that tasks no longer interfere; then τ* = s U⊥ Σ V⊥ᵀ. Vectors are
    averaged.

    Args:
        scale: s, on matrices and vectors alike.
    """

    id: ClassVar[str] = "tsv"
    elementwise: ClassVar[bool] = False
    scale: float = 1.0

    def merge(self, vectors: Tensor) -> Tensor:
        """Merge one tensor: float32 `(T, *shape)` → `(*shape)`."""
        shape = vectors.shape[1:]
        if len(shape) < 2 or not shape.numel():
            return vectors.mean(0).mul_(self.scale)
        matrices = vectors.reshape(len(vectors), shape[0], -1)
        rank = max(min(matrices.shape[1:]) // len(vectors), 1)
        cut = [leading(matrix, rank) for matrix in matrices]
        u = orthonormal(torch.cat([each.u for each in cut], 1))
        v = orthonormal(torch.cat([each.v for each in cut], 1))
        s = torch.cat([each.s for each in cut])
        return ((u * s) @ v.mT).mul_(self.scale).view(shape)


def leading(matrix: Tensor, rank: int) -> Spectral:
    """The `rank` leading singular directions of a float32 `(rows, columns)`."""
    svd = svd_gram if min(matrix.shape) <= _GRAM_LIMIT else svd_randomized
    u, s, v = svd(matrix, rank)
    return Spectral(u[:, :rank], s[:rank], v[:, :rank])


def orthonormal(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, if it is wide): P Qᵀ of P D Qᵀ."""
    svd = torch.linalg.svd(columns, full_matrices=False)
    return torch.mm(svd.U, svd.Vh)
