"""Truncated SVD of each matrix delta: PERU-LoRA (2310.01886) where the delta is an adapter's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs.base import Encoded, Encoder, Parts, SharedParts, TensorCodec
from fusionkit.codecs.decomposition import (
    Spectral,
    matrix_of,
    svd_exact,
    svd_gram,
    svd_product,
    svd_randomized,
)
from fusionkit.codecs.layout import Layout
from fusionkit.codecs.stored_factors import factors_layout, pack_factors, unpack_factors
from fusionkit.codecs.values import (
    ValueDtype,
    pack_values,
    stored_bytes,
    unpack_values,
    values_layout,
)
from fusionkit.errors import CodecError
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import TaskVectors

_GRAM_LIMIT = 2048

Ranks = dict[str, int]
"""A tensor's name → how many singular directions it keeps."""


@dataclass(frozen=True)
class SVD(TensorCodec):
    """Keep the leading singular directions of each matrix: δ ≈ U_q Σ_q V_qᵀ.

    Of a LoRA, whose delta is a product already, the product is cut without being formed (QR of
    the factors, SVD of their small core): PERU-LoRA. A tensor of more than two axes counts as the
    matrix (first axis) × (all others). Vectors, and matrices whose factors would be larger than
    they are, are kept whole. The factors U √Σ and V √Σ are stored, alike in scale, so that both
    sit well in fp16 or in columns of integers; of integers each is fitted to the other as it is
    stored. The error is that of the directions left out, (Σ_{i>q} σ_i²)^½, and at most √σ₁ times
    what rounding takes from either factor.

    Exactly one of rank, energy, ratio and budget is given.

    Args:
        rank: number of singular directions; or a number per tensor, as pattern
            (`*.query.weight`) → number, of which the first that matches counts.
        energy: the fewest directions that hold this share of ‖δ‖², in (0, 1].
        ratio: share of the full rank, in (0, 1]; at least one direction.
        budget: bytes per task for all factors and vectors together (heads and the file's header
            are not counted); the directions that hold most per byte are kept.
        scope: whether `energy` is held by each `tensor`, or by the whole `model`'s delta, so that
            directions go where they matter.
        method: `exact`: LAPACK's SVD. `gram`: eigenvectors of the smaller Gram matrix in float64;
            the error is the optimal one to within 1e-5 of ‖δ‖. `randomized`: subspace iteration
            (Halko et al., 0909.4061) from a fixed seed; the error is at most 1% above the
            optimal one on deltas of real fine-tunes, whose spectra decay slowly. `auto`: gram up
            to 2048 rows or columns, or where the whole spectrum is needed; else randomized.
        vectors: keep tensors of one axis `whole`, or `drop` their deltas.
        dtype: how the factors' and vectors' values are stored (integers: a scale per column).

    Raises:
        CodecError: not exactly one of rank, energy, ratio and budget is given, or it is out of
            range.
    """

    id: ClassVar[str] = "svd"
    cost: ClassVar[str] = (
        "a matrix of m × n: b r (m + n) bits at rank r in a dtype of b bits; a vector of n: b n"
    )
    usual: ClassVar[dict[str, Any]] = {"rank": 16}
    rank: int | dict[str, int] | None = None
    energy: float | None = None
    ratio: float | None = None
    method: Literal["auto", "exact", "gram", "randomized"] = "auto"
    vectors: Literal["whole", "drop"] = "whole"
    dtype: ValueDtype = "fp16"
    budget: int | None = None
    scope: Literal["tensor", "model"] = "tensor"

    def __post_init__(self) -> None:
        given = {k: getattr(self, k) for k in ("rank", "energy", "ratio", "budget")}
        given = {k: v for k, v in given.items() if v is not None}
        if len(given) != 1:
            raise CodecError(
                f"expected exactly one of SVD's rank, energy, ratio, budget; got {given or 'none'}"
            )
        ranks = self.rank.values() if isinstance(self.rank, dict) else [self.rank]
        for least in (*ranks, self.budget):
            if least is not None and least < 1:
                raise CodecError(
                    f"expected SVD's {next(iter(given))} to be at least 1, got {least}"
                )
        for name in ("energy", "ratio"):
            if name in given and not 0 < given[name] <= 1:
                raise CodecError(f"expected SVD's {name} in (0, 1], got {given[name]}")
        if self.scope == "model" and self.energy is None:
            raise CodecError("SVD's scope: model is for an energy; a budget is the model's anyway")
        if self._whole_spectrum and self.method == "randomized":
            raise CodecError(
                f"SVD's {next(iter(given))} needs the whole spectrum: use method gram or exact"
            )

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """A pass where the whole model's spectrum decides."""
        ranks: list[Ranks] | None = None
        if self.budget is not None or self.scope == "model":
            ranks = self._shared_out(family)

        def encode(vectors: TaskVectors) -> Encoded:
            name, shape = vectors.name, vectors.shape
            own = [
                self._encode(_delta(vectors, t), name, shape, ranks[t][name] if ranks else None)
                for t in range(len(vectors))
            ]
            return Encoded(name, tasks=own)

        return Encoder(encode)

    def encode_tensor(self, delta: Tensor, name: str) -> Parts:
        """Factors of a matrix, or the values of a vector; none where the delta is zero."""
        return self._encode(delta, name, delta.shape)

    def layout(self, shape: torch.Size) -> Layout:
        """The factors, or the values of what was kept whole."""
        return {
            **values_layout((shape.numel(),), self.dtype),
            **factors_layout(shape, self.dtype),
        }

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """U_q Σ_q V_qᵀ in the tensor's shape."""
        factors = self.factors(parts, shape)
        if factors is not None:
            return factors.dense(shape)
        return unpack_values(parts, shape.numel(), self.dtype).view(shape)

    def factors(self, parts: Parts, shape: torch.Size) -> LowRank | None:
        """The factors as stored; None of a tensor that was kept whole."""
        if "values" in parts:
            return None
        return unpack_factors(parts, shape, self.dtype)

    def likely_bytes(self, shapes: Mapping[str, Sequence[int]], tasks: int) -> int | None:
        """Factors of each matrix and the vectors; or the budget."""
        if self.budget is not None:
            return tasks * self.budget
        if self.energy is not None:
            return None
        return tasks * sum(self._bytes_of(name, torch.Size(s)) for name, s in shapes.items())

    def _bytes_of(self, name: str, shape: torch.Size) -> int:
        """Of one tensor, where its rank is known beforehand."""
        if len(shape) < 2 and self.vectors == "drop":
            return 0
        rows, columns = matrix_of(shape)
        full = min(rows, columns)
        if full > 1:
            asked = self._asked(name) if self.rank is not None else round((self.ratio or 0) * full)
            rank = min(max(asked, 1), full)
            if rank * (rows + columns) < rows * columns:
                sides = ((rows, rank), (columns, rank))
                return sum(stored_bytes(side, self.dtype) for side in sides)
        return stored_bytes((shape.numel(),), self.dtype)

    @property
    def _whole_spectrum(self) -> bool:
        return self.energy is not None or self.budget is not None

    def _encode(
        self, delta: Tensor | LowRank, name: str, shape: torch.Size, rank: int | None = None
    ) -> Parts:
        if rank == 0 or not _is_nonzero(delta) or (len(shape) < 2 and self.vectors == "drop"):
            return {}
        rows, columns = matrix_of(shape)
        if min(rows, columns) > 1:
            matrix = delta if isinstance(delta, LowRank) else delta.reshape(rows, columns)
            factors = self._cut(matrix, name, rows, columns, rank)
            if factors.left.numel() + factors.right.numel() < shape.numel():
                return pack_factors(matrix, factors, self.dtype)
        return pack_values(_dense(delta, shape).reshape(-1), self.dtype)

    def _cut(
        self, delta: Tensor | LowRank, name: str, rows: int, columns: int, rank: int | None
    ) -> LowRank:
        full = min(rows, columns)
        if rank is None and self.energy is None:
            asked = self._asked(name) if self.rank is not None else round((self.ratio or 0) * full)
            rank = min(max(asked, 1), full)
        spectral = self._spectral(delta, rows, columns, full if rank is None else rank)
        if rank is None:
            held = torch.cumsum(spectral.s.to(torch.float64).square(), 0)
            assert self.energy is not None
            rank = int(torch.searchsorted(held, self.energy * held[-1] * (1 - 1e-12))) + 1
        return spectral.cut(rank)

    def _asked(self, name: str) -> int:
        if not isinstance(self.rank, dict):
            return self.rank or 0
        found = [rank for pattern, rank in self.rank.items() if fnmatchcase(name, pattern)]
        if not found:
            raise CodecError(
                f"none of SVD's rank patterns ({', '.join(self.rank)}) matches '{name}'; add one, "
                "'*' for all others"
            )
        return found[0]

    def _spectral(self, delta: Tensor | LowRank, rows: int, columns: int, rank: int) -> Spectral:
        if isinstance(delta, LowRank):
            return svd_product(delta)
        full = min(rows, columns)
        method = self.method
        if method == "auto":
            small = full <= _GRAM_LIMIT or self._whole_spectrum or 4 * rank > full
            method = "gram" if small else "randomized"
        return _METHODS[method](delta.reshape(rows, columns), rank)

    def _is_cut(self, shape: torch.Size) -> bool:
        """Whether a tensor is a matrix, and fewer directions than all may be kept of it."""
        rows, columns = matrix_of(shape)
        saves = rows * columns > rows + columns
        return min(rows, columns) > 1 and (self.budget is None or saves)

    def _spectra(self, vectors: TaskVectors) -> list[Tensor | None]:
        """Per task the squared singular values, float64; none of a vector; None of a zero delta."""
        found: list[Tensor | None] = []
        rows, columns = matrix_of(vectors.shape)
        for task in range(len(vectors)):
            delta = _delta(vectors, task)
            if not _is_nonzero(delta):
                found.append(None)
            elif self._is_cut(vectors.shape):
                s = self._spectral(delta, rows, columns, min(rows, columns)).s
                found.append(s.to(torch.float64).square().cpu())
            else:
                found.append(torch.empty(0, dtype=torch.float64))
        return found

    def _shared_out(self, family: Family) -> list[Ranks]:
        """Each task's ranks, from the spectra of its whole delta: most held per byte first."""
        spectra: list[dict[str, Tensor]] = [{} for _ in family.tasks]
        fixed = [0] * len(family.tasks)
        ranks: list[Ranks] = [{} for _ in family.tasks]
        cost: dict[str, int] = {}
        for name, found in family.each(self._spectra).items():
            shape = torch.Size(family.base.specs[name].shape)
            rows, columns = matrix_of(shape)
            gain = (rows * columns - 1) // (rows + columns)  # the last rank that saves space
            cost[name] = stored_bytes((rows, 1), self.dtype) + stored_bytes(
                (columns, 1), self.dtype
            )
            for task, own in enumerate(found):
                if own is None:
                    ranks[task][name] = 0
                elif not self._is_cut(shape):
                    ranks[task][name] = 1  # kept whole, or dropped
                    if self.vectors == "whole" or len(shape) > 1:
                        fixed[task] += stored_bytes((shape.numel(),), self.dtype)
                else:
                    spectra[task][name] = own if self.budget is None else own[:gain]
        for task, squares in enumerate(spectra):
            least = fixed[task] + min((cost[name] for name in squares), default=0)
            if self.budget is not None and least > self.budget:
                raise CodecError(
                    f"task '{family.tasks[task]}': a budget of {self.budget} bytes is less than "
                    f"its vectors ({fixed[task]} bytes) and one direction; raise it, or drop the "
                    "vectors"
                )
            left = None if self.budget is None else self.budget - fixed[task]
            ranks[task].update(_allot(squares, cost, left, self.energy))
        return ranks


def _allot(
    squares: dict[str, Tensor], cost: dict[str, int], budget: int | None, energy: float | None
) -> Ranks:
    """How many directions each matrix keeps, given all squared singular values."""
    names = list(squares)
    if not names:
        return {}
    values = torch.cat([squares[name] for name in names])
    owner = torch.repeat_interleave(
        torch.arange(len(names)), torch.tensor([len(squares[name]) for name in names])
    )
    costs = torch.tensor([cost[name] for name in names], dtype=torch.float64)[owner]
    worth = values if budget is None else values / costs
    order = torch.argsort(worth, descending=True, stable=True)
    if budget is None:
        assert energy is not None
        held = torch.cumsum(values[order], 0)
        count = int(torch.searchsorted(held, energy * held[-1] * (1 - 1e-12))) + 1
    else:
        spent = torch.cumsum(costs[order], 0)
        count = int(torch.searchsorted(spent, float(budget), right=True))
    kept = torch.bincount(owner[order[:count]], minlength=len(names))
    return dict(zip(names, kept.tolist(), strict=True))


def _delta(vectors: TaskVectors, task: int) -> Tensor | LowRank:
    factors = vectors.low_rank(task)
    return vectors[task] if factors is None else factors


def _is_nonzero(delta: Tensor | LowRank) -> bool:
    return all(bool(part.any()) for part in (delta if isinstance(delta, LowRank) else (delta,)))


def _dense(delta: Tensor | LowRank, shape: torch.Size) -> Tensor:
    return delta.dense(shape) if isinstance(delta, LowRank) else delta


_METHODS = {"exact": svd_exact, "gram": svd_gram, "randomized": svd_randomized}
