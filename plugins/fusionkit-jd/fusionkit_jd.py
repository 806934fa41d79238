"""Factors that many LoRAs share, and a small core for each (Gabrielsson et al., 2407.00066)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fusionkit import DeltaCodec, Encoded, Encoder, Family, LowRank, Parts, SharedParts, TaskVectors
from fusionkit.codecs.decomposition import (
    Spectral,
    matrix_of,
    svd_gram,
    svd_product,
    svd_randomized,
)
from fusionkit.codecs.layout import Layout, PartSpec
from fusionkit.codecs.values import (
    ValueDtype,
    pack_values,
    stored_bytes,
    unpack_values,
    values_layout,
)
from fusionkit.errors import CodecError

_ROUNDS = 50
"""Alternations, at most."""
_GAIN = 1e-7
"""The share of what is held already that a round must add for another one to follow."""
_NONE = 1e-6
"""Directions that hold less than this share (squared) of the strongest one's are none."""
_SINGULAR = 1e-6
"""Eigenvalues of a Gram matrix below this share of the largest count as 0."""
_OVERSAMPLE = 32
_GRAM_LIMIT = 2048
"""Rows or columns up to which the Gram matrix is the fastest way to all directions."""
_MOST_CLUSTERS = 256

Form = Literal["full", "diagonal"]


@dataclass(frozen=True)
class JointDiagonalization(DeltaCodec):
    """Joint diagonalisation: δ_t ≈ U Σ_t Vᵀ, U and V shared by all tasks, Σ_t a task's own.

    A task costs r² values a matrix (r, if Σ_t is diagonal) where its own factors would cost
    r (m + n): the more adapters there are, and the more alike, the more that saves. At a rank of
    the sum of the adapters' ranks nothing is lost. Adapters' products are never formed; vectors,
    and matrices that would not become smaller, are kept whole. Σ_t is fitted to U and V as they
    are stored; a task that is added later is fitted to those that are there. So no task is further
    off than ‖δ_t‖ and what rounding takes from Σ_t.

    Args:
        rank: r, columns of U and V; no more than the tasks' deltas fill.
        form: of Σ_t. `full`: U and V orthonormal, by alternating eigenvalue problems from their
            joint subspace. `diagonal`: by alternating least squares, from the singular directions
            of single tasks that explain most of all tasks.
        clusters: sets of tasks with a U and V each, found matrix by matrix: each task is with the
            one that holds most of it.
        normalize: whether every task's matrix counts alike, as in the paper; else by its ‖δ_t‖².
        dtype: how all values are stored.

    Raises:
        CodecError: `rank` or `clusters` is out of range.
    """

    id: ClassVar[str] = "jd"
    rank: int = 16
    form: Form = "full"
    clusters: int = 1
    normalize: bool = True
    dtype: ValueDtype = "fp16"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise CodecError(
                f"expected JointDiagonalization's rank to be at least 1, got {self.rank}"
            )
        if not 1 <= self.clusters <= _MOST_CLUSTERS:
            raise CodecError(
                f"expected JointDiagonalization's clusters in 1 to {_MOST_CLUSTERS}, "
                f"got {self.clusters}"
            )

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """Nothing to prepare: tensor by tensor, all tasks' together."""

        def encode(vectors: TaskVectors) -> Encoded:
            deltas = _Deltas(vectors, self.normalize)
            if shared is None:
                parts = self._shared(deltas)
            else:
                parts = {k: part.to(vectors.device) for k, part in shared(vectors.name).items()}
            count = sum(f"left.{place}" in parts for place in range(self.clusters))
            bases = [self._basis(parts, vectors.shape, place) for place in range(count)]
            own = [self._own(deltas, task, bases) for task in range(len(vectors))]
            return Encoded(vectors.name, parts if shared is None else {}, own)

        return Encoder(encode)

    def layout(self, shape: torch.Size) -> Layout:
        """Each cluster's factors; a task's core and its cluster, or the values."""
        rows, columns = matrix_of(shape)
        found = {
            "cluster": PartSpec(torch.uint8, (1,)),
            **values_layout((shape.numel(),), self.dtype),
        }
        for place in range(self.clusters):
            found |= values_layout((rows, None), self.dtype, f"left.{place}")
            found |= values_layout((columns, None), self.dtype, f"right.{place}")
        core = (None,) if self.form == "diagonal" else (None, None)
        return {**found, **values_layout(core, self.dtype, "core")}

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """U Σ_t Vᵀ in the tensor's shape."""
        factors = self.factors(parts, shape)
        if factors is not None:
            return factors.dense(shape)
        if "values" in parts:
            return unpack_values(parts, shape.numel(), self.dtype).view(shape)
        device = next(part.device for part in parts.values())
        return torch.zeros(shape, device=device)  # the others' alone: its own delta is zero

    def factors(self, parts: Parts, shape: torch.Size) -> LowRank | None:
        """U Σ_t and V, or U and V Σ_tᵀ; None of a tensor that was kept whole, or is zero."""
        if "core" not in parts:
            return None
        cluster = int(parts["cluster"]) if "cluster" in parts else 0
        left, right = self._basis(parts, shape, cluster)
        core = unpack_values(parts, left.shape[1], self.dtype, "core")
        wanted = (left.shape[1], right.shape[1])[: core.ndim]
        if core.shape != wanted:
            raise ValueError(f"a core of {tuple(core.shape)} between factors of {wanted} columns")
        if core.ndim == 1:
            return LowRank(left * core, right)
        if left.shape[1] < right.shape[1]:
            return LowRank(left, right @ core.mT)
        return LowRank(left @ core, right)

    def _shared(self, deltas: "_Deltas") -> Parts:
        """The parts that hold each cluster's U and V; none where nothing would become smaller."""
        rows, columns = matrix_of(deltas.shape)
        if min(rows, columns) < 2 or not deltas.moved:
            return {}
        parts: dict[str, Tensor] = {}
        size = 0
        for place, (tasks, basis) in enumerate(
            _clusters(deltas, self.form, self.rank, self.clusters)
        ):
            cores = [_core(deltas[task], basis, self.form).values for task in tasks]
            for side, values in zip(("left", "right"), _scaled(basis, cores), strict=True):
                parts |= pack_values(values.to(torch.float32), self.dtype, f"{side}.{place}")
            size += len(tasks) * stored_bytes(tuple(cores[0].shape), self.dtype)
        size += sum(part.nbytes for part in parts.values())
        whole = len(deltas.moved) * stored_bytes((rows * columns,), self.dtype)
        return parts if size < whole else {}

    def _basis(self, parts: Parts, shape: torch.Size, cluster: int) -> LowRank:
        """A cluster's U and V as they are stored."""
        rows, columns = matrix_of(shape)
        left = unpack_values(parts, rows, self.dtype, f"left.{cluster}")
        return LowRank(left, unpack_values(parts, columns, self.dtype, f"right.{cluster}"))

    def _own(self, deltas: "_Deltas", task: int, bases: Sequence[LowRank]) -> Parts:
        """A task's core, and its cluster; or the values of a delta that is kept whole."""
        if not deltas.norms[task]:
            return {}
        delta = deltas[task]
        if not bases:
            dense = delta.dense(deltas.shape) if isinstance(delta, LowRank) else delta
            return pack_values(dense.reshape(-1).to(torch.float32), self.dtype)
        cores = [_core(delta, basis, self.form) for basis in bases]
        place = max(range(len(cores)), key=lambda each: cores[each].held)
        parts = pack_values(cores[place].values.to(torch.float32), self.dtype, "core")
        if len(bases) > 1:
            parts["cluster"] = torch.tensor([place], dtype=torch.uint8, device=deltas.device)
        return parts


class _Deltas:
    """All tasks' deltas of one tensor as matrices: adapters' products, or formed when asked for.

    Args:
        vectors: the tensor's task vectors.
        normalize: whether weights make all tasks count alike.

    Attributes:
        shape: the tensor's.
        device: where they are.
        norms: each task's ‖δ_t‖.
        moved: the tasks whose delta is not zero.
        weights: what each task's delta is multiplied by, before it is held against others'.
    """

    def __init__(self, vectors: TaskVectors, normalize: bool) -> None:
        self._vectors = vectors
        self.shape, self.device = vectors.shape, vectors.device
        self._products = [vectors.low_rank(task) for task in range(len(vectors))]
        self.norms = [_norm(self[task]) for task in range(len(vectors))]
        self.moved = [task for task, norm in enumerate(self.norms) if norm]
        largest = max(self.norms, default=0)
        self.weights = [1 / ((norm if normalize else largest) or 1) for norm in self.norms]

    def __getitem__(self, task: int) -> Tensor | LowRank:
        product = self._products[task]
        if product is not None:
            return LowRank(*(factor.to(torch.float64) for factor in product))
        return self._vectors[task].reshape(matrix_of(self.shape))

    def times(self, task: int, right: Tensor) -> Tensor:
        """A task's weighted δ V, float64."""
        return _times(self[task], right) * self.weights[task]

    def transposed_times(self, task: int, left: Tensor) -> Tensor:
        """A task's weighted δᵀ U, float64."""
        return _times(_transposed(self[task]), left) * self.weights[task]

    def spectral(self, task: int, rank: int) -> Spectral:
        """A task's leading singular directions, float64, weighted."""
        delta = self[task]
        if isinstance(delta, LowRank):
            found = svd_product(delta).first(rank)
        elif min(delta.shape) <= _GRAM_LIMIT:
            found = svd_gram(delta.to(torch.float64), rank).first(rank)
        else:
            found = svd_randomized(delta, rank)
        u, s, v = (each.to(torch.float64) for each in found)
        return Spectral(u, s * self.weights[task], v)


class _Core(NamedTuple):
    """Σ_t, and how much of ‖δ_t‖² it holds."""

    values: Tensor
    held: float


def _core(delta: Tensor | LowRank, basis: LowRank, form: Form) -> _Core:
    """The Σ_t of least ‖δ_t − U Σ_t Vᵀ‖, for any U and V."""
    left, right = (side.to(torch.float64) for side in basis)
    product = _times(delta, right)
    grams = left.mT @ left, right.mT @ right
    if form == "full":
        wanted = left.mT @ product
        values = _inverse(grams[0]) @ wanted @ _inverse(grams[1])
    else:
        wanted = (left * product).sum(0)
        values = _inverse(grams[0] * grams[1]) @ wanted
    return _Core(values, float((values * wanted).sum()))


def _full(deltas: _Deltas, tasks: Sequence[int], rank: int) -> LowRank:
    """Orthonormal U and V of most Σ_t w_t² ‖Uᵀ δ_t V‖², each in turn, given the other."""
    right, before = _start(deltas, tasks, rank), 0.0
    for _ in range(_ROUNDS):
        left, _ = _leading([deltas.times(task, right) for task in tasks], rank)
        right, held = _leading([deltas.transposed_times(task, left) for task in tasks], rank)
        if held <= before * (1 + _GAIN):
            break
        before = held
    return LowRank(left, right)


def _start(deltas: _Deltas, tasks: Sequence[int], rank: int) -> Tensor:
    """The leading right directions of all tasks together, by subspace iteration."""
    columns = matrix_of(deltas.shape)[1]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(
        columns, min(rank + _OVERSAMPLE, columns), generator=generator, dtype=torch.float64
    )
    right = torch.linalg.qr(drawn.to(deltas.device)).Q
    for _ in range(2):
        image = torch.zeros_like(right)
        for task in tasks:
            image += deltas.transposed_times(task, deltas.times(task, right))
        right = torch.linalg.qr(image).Q
    held = torch.zeros(right.shape[1], right.shape[1], dtype=right.dtype, device=right.device)
    for task in tasks:
        product = deltas.times(task, right)
        held += product.mT @ product
    vectors = torch.linalg.eigh(held).eigenvectors.flip(1)
    return torch.mm(right, vectors[:, :rank])


def _leading(products: Sequence[Tensor], rank: int) -> tuple[Tensor, float]:
    """The leading left directions of products side by side, and the energy that they hold."""
    found = svd_gram(torch.cat(list(products), 1), rank).first(rank)
    kept = int((found.s > _NONE * found.s[0]).sum())
    return found.u[:, :kept], float(found.s.square().sum())


def _diagonal(deltas: _Deltas, tasks: Sequence[int], rank: int) -> LowRank:
    """U, V and diagonal Σ_t of least Σ_t w_t² ‖δ_t − U Σ_t Vᵀ‖², by alternating least squares."""
    best = basis = _pursuit(deltas, tasks, rank)
    before = 0.0
    for _ in range(_ROUNDS):
        cores = [_core(deltas[task], basis, "diagonal") for task in tasks]
        weights = [deltas.weights[task] for task in tasks]
        held = sum(core.held * weight**2 for core, weight in zip(cores, weights, strict=True))
        if held <= before * (1 + _GAIN):
            break
        best, before = basis, held
        scales = torch.stack([c.values * w for c, w in zip(cores, weights, strict=True)])
        left = _partner(deltas.times, tasks, scales, basis.right)
        right = _partner(deltas.transposed_times, tasks, scales, left)
        basis = LowRank(*(side / side.norm(dim=0).clamp(min=1e-30) for side in (left, right)))
    return best


def _partner(
    times: Callable[[int, Tensor], Tensor], tasks: Sequence[int], scales: Tensor, other: Tensor
) -> Tensor:
    """The U of least error, given V and all Σ_t (T, r); or V, given U."""
    wanted = times(tasks[0], other) * scales[0]
    for task, scale in zip(tasks[1:], scales[1:], strict=True):
        wanted += times(task, other) * scale
    return torch.mm(wanted, _inverse((other.mT @ other) * (scales.mT @ scales)))


def _pursuit(deltas: _Deltas, tasks: Sequence[int], rank: int) -> LowRank:
    """Of all tasks' singular directions u vᵀ those that explain most of all tasks, one by one.

    Orthogonal matching pursuit, by a Cholesky decomposition of the directions' Gram matrix, a
    column at a time.
    """
    found = [deltas.spectral(task, rank) for task in tasks]
    left, right = torch.cat([each.u for each in found], 1), torch.cat([each.v for each in found], 1)
    strength = torch.cat([each.s for each in found])
    # ⟨u vᵀ, δ_t⟩ of each direction and task, and ‖u vᵀ‖², of what the chosen ones leave.
    held = torch.stack([(left * deltas.times(task, right)).sum(0) for task in tasks], 1)
    free = (strength > _NONE * strength.max()).to(torch.float64)
    chosen: list[int] = []
    columns: list[Tensor] = []
    for _ in range(min(rank, len(strength))):
        gain = torch.where(free > _SINGULAR, held.square().sum(1) / free.clamp(min=_SINGULAR), 0)
        place = int(gain.argmax())
        if not gain[place] > 0:
            break
        column = (left.mT @ left[:, place]) * (right.mT @ right[:, place])
        for earlier in columns:
            column -= earlier * earlier[place]
        column /= column[place].sqrt()
        held -= column[:, None] * (held[place] / column[place])
        free -= column.square()
        chosen.append(place)
        columns.append(column)
    return LowRank(left[:, chosen], right[:, chosen])


def _clusters(
    deltas: _Deltas, form: Form, rank: int, count: int
) -> list[tuple[list[int], LowRank]]:
    """Sets of tasks, each task in the one whose factors hold most of it, and those factors.

    They start from single tasks, each the one that those before hold least of.
    """
    fit = _full if form == "full" else _diagonal
    tasks = deltas.moved
    if count == 1:
        return [(tasks, fit(deltas, tasks, rank))]

    def held(task: int) -> list[float]:
        return [
            _core(deltas[task], basis, form).held * deltas.weights[task] ** 2 for basis in bases
        ]

    bases = [fit(deltas, tasks[:1], rank)]
    while len(bases) < min(count, len(tasks)):
        bases.append(fit(deltas, [min(tasks, key=lambda task: max(held(task)))], rank))
    found: list[tuple[list[int], LowRank]] = []
    before = 0.0
    for _ in range(_ROUNDS):
        each = {task: held(task) for task in tasks}
        total = sum(map(max, each.values()))
        if total <= before * (1 + _GAIN):
            break
        before, best = total, {task: own.index(max(own)) for task, own in each.items()}
        sets = [[task for task in tasks if best[task] == place] for place in range(len(bases))]
        found = [(own, basis) for own, basis in zip(sets, bases, strict=True) if own]
        bases = [fit(deltas, own, rank) for own, _ in found]
    return found


def _scaled(basis: LowRank, cores: Sequence[Tensor]) -> LowRank:
    """The same factors, scaled alike, so that the largest entry of any core becomes 1."""
    stacked = torch.stack(list(cores)).abs()
    root = (stacked.amax(0) if stacked.ndim == 2 else stacked.max()).sqrt()
    return LowRank(basis.left * root, basis.right * root)


def _inverse(gram: Tensor) -> Tensor:
    """The pseudo-inverse of a Gram matrix, whatever its columns' scales are."""
    size = gram.diagonal().sqrt()
    size = torch.where(size > 0, size, 1)
    outer = size[:, None] * size
    inverse: Tensor = torch.linalg.pinv(gram / outer, rtol=_SINGULAR, hermitian=True)
    return inverse / outer


def _times(delta: Tensor | LowRank, right: Tensor) -> Tensor:
    """δ V in float64; of a matrix that is no product computed in its own precision."""
    if isinstance(delta, LowRank):
        return delta.left @ (delta.right.mT @ right)
    largest = right.abs().max().clamp(min=torch.finfo(right.dtype).tiny)
    product = torch.mm(delta, (right / largest).to(delta.dtype))
    return product.to(torch.float64) * largest


def _transposed(delta: Tensor | LowRank) -> Tensor | LowRank:
    return LowRank(delta.right, delta.left) if isinstance(delta, LowRank) else delta.mT


def _norm(delta: Tensor | LowRank) -> float:
    if isinstance(delta, LowRank):
        grams = (delta.left.mT @ delta.left) * (delta.right.mT @ delta.right)
        return float(grams.sum().clamp(min=0).sqrt())
    return float(torch.linalg.vector_norm(delta, dtype=torch.float64))
