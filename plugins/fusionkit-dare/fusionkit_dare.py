"""DARE: drop most of a task vector at random, and rescale the rest (Yu et al., 2311.03099)."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fusionkit import (
    WHOLE_MODEL,
    DeltaCodec,
    Encoded,
    Encoder,
    Family,
    Mean,
    Merge,
    MergeTensor,
    Parts,
    SharedParts,
    TaskVectors,
)
from fusionkit.codecs.decomposition import matrix_of, squared_singular_values
from fusionkit.codecs.layout import Layout, PartSpec
from fusionkit.codecs.operands import Operand, Sparse, scaled
from fusionkit.codecs.values import (
    ValueDtype,
    held_values,
    pack_values,
    unpack_values,
    values_layout,
)
from fusionkit.errors import CodecError
from fusionkit.task_vectors import Change, ChangedVectors

_BITS = 53
"""Of each hash, so many bits are compared; the probability is exact to 2⁻⁵³."""
_HASHES = 1 << _BITS
_BLOCK = 1 << 20
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_LEAST = "least"
"""The part that all tasks share: the least trace norm of any of those first compressed."""
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


@dataclass(frozen=True)
class DARE(DeltaCodec):
    """Keep each entry with probability 1 − p, divided by 1 − p.

    Which entries are kept follows from a key of 8 bytes a tensor, so that only their values are
    stored: 16 (1 − p) bits per parameter in fp16. The same seed keeps the same entries wherever,
    and with whatever device and version of torch, a bundle is read. What is kept comes back as
    τ_t / (1 − p), off by the rounding of its dtype over 1 − p; the rest is dropped.

    `spread` and `shrink` are steps of UltraDelta (Wang et al., 2505.13563): its variance-based
    mixed sparsity allocation and its trace-norm-guided rescaling. It divides every tensor by 1 − p
    of the whole, and takes the norms of what was kept; here a tensor is divided by 1 − p of its
    own, so that its expectation is what it was, and the norms are the task vectors'.

    Args:
        drop: p, in [0, 1).
        seed: of the draws.
        dtype: how the kept values are stored.
        spread: d, how far a tensor's p is from `drop`, by the standard deviation of its entries.
            Of a task's parameters the third in the tensors of the least has p + d, the next third
            p, and the rest so much less, at least p − d, that p are dropped in all. It costs 8
            bytes a tensor.
        shrink: g, in (0, 1]. A task is scaled by γ = max(g, N / N_t), where N_t is the trace norm
            of its vector, summed over the matrices, and N the least of any task; UltraDelta's
            are in [0.5, 1]. Tasks that are added later are held against the same N.

    Raises:
        CodecError: a probability is outside [0, 1), or `shrink` is outside (0, 1].
    """

    id: ClassVar[str] = "dare"
    drop: float = 0.9
    seed: int = 0
    dtype: ValueDtype = "fp16"
    spread: float = 0.0
    shrink: float = 1.0

    def __post_init__(self) -> None:
        _check(self.drop, "DARE")
        if not 0 <= self.drop - self.spread <= self.drop + self.spread < 1:
            raise CodecError(
                f"expected DARE's drop ± spread in [0, 1), got {self.drop} ± {self.spread}"
            )
        if not 0 < self.shrink <= 1:
            raise CodecError(f"expected DARE's shrink in (0, 1], got {self.shrink}")

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """Nothing to prepare; for `spread` and `shrink` a pass that measures every tensor."""
        if not self.spread and self.shrink == 1:
            return Encoder(lambda vectors: self._encode(vectors, [_PLAIN] * len(vectors)))
        measured = family.each(self._measure)
        rates: list[Mapping[str, float]] = []
        norms = torch.zeros(len(family.tasks), dtype=torch.float64)
        for task in range(len(family.tasks)):
            moved = {name: each for name, at in measured.items() if (each := at[task])}
            norms[task] = sum(each.norm for each in moved.values())
            deviations = {name: each.deviation for name, each in moved.items()}
            rates.append(
                placed(deviations, family.sizes, self.drop, self.spread) if self.spread else {}
            )
        stored = {} if shared is None else shared(WHOLE_MODEL)
        if self.shrink < 1 and _LEAST not in stored and norms.any():
            stored = {_LEAST: norms[norms > 0].min().to(torch.float32).view(1)}
        factors = torch.ones_like(norms)
        if _LEAST in stored:
            factors = (stored[_LEAST].cpu() / norms).clamp(self.shrink, 1.0)  # 1 of a zero norm
        plans = [_Plan(*each) for each in zip(rates, factors.tolist(), strict=True)]
        return Encoder(
            lambda vectors: self._encode(vectors, plans),
            lambda _: Encoded(WHOLE_MODEL, stored) if shared is None else None,
        )

    def layout(self, shape: torch.Size) -> Layout:
        """The values kept, the key, and the least trace norm of all tasks."""
        return {
            **values_layout((None,), self.dtype),
            "key": PartSpec(torch.int64, (2 if self.spread else 1,)),
            _LEAST: PartSpec(torch.float32, (1,)),
        }

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """γ τ_t / (1 − p) where it was kept."""
        mask, drop = self._mask(parts, shape)
        delta = torch.zeros(shape.numel(), device=mask.device)
        values = unpack_values(parts, int(mask.sum()), self.dtype)
        delta[mask] = values.div_(1 - drop)
        return delta.view(shape)

    def operand(self, parts: Parts, shape: torch.Size) -> Operand:
        """The values at their positions."""
        mask, drop = self._mask(parts, shape)
        positions = mask.nonzero().view(-1)
        values = held_values(parts, len(positions), self.dtype)
        return scaled(Sparse.of(positions, values, shape), 1 / (1 - drop))

    def _mask(self, parts: Parts, shape: torch.Size) -> tuple[Tensor, float]:
        """Which entries were kept, and p."""
        key, *limit = parts["key"].tolist()
        drop = 1 - limit[0] / _HASHES if limit else self.drop
        return kept(key, shape.numel(), drop, parts["values"].device), drop

    def _encode(self, vectors: TaskVectors, plans: Sequence["_Plan"]) -> Encoded:
        """γ times the values kept, and the key; beside it 2⁵³ (1 − p), where p was placed."""
        own = []
        for task, (name, plan) in enumerate(zip(vectors.tasks, plans, strict=True)):
            flat = vectors[task].view(-1)
            key, drop = [key_of(self.seed, name, vectors.name)], self.drop
            if vectors.name in plan.rates:
                limit = round((1 - plan.rates[vectors.name]) * _HASHES)
                key, drop = [*key, limit], 1 - limit / _HASHES
            values = flat[kept(key[0], flat.numel(), drop, flat.device)].mul_(plan.factor)
            parts = {"key": torch.tensor(key), **pack_values(values, self.dtype)}
            own.append(parts if values.any() else {})
        return Encoded(vectors.name, tasks=own)

    def _measure(self, vectors: TaskVectors) -> list["_Measured | None"]:
        """Each task's vector; None where it is zero."""
        found: list[_Measured | None] = []
        for vector in vectors:
            if not vector.any():
                found.append(None)
                continue
            norm = 0.0
            if self.shrink < 1 and vector.ndim > 1:
                matrix = vector.view(matrix_of(vector.shape))
                norm = float(squared_singular_values(matrix).sqrt().sum())
            found.append(_Measured(float(vector.to(torch.float64).std(correction=0)), norm))
        return found


class _Measured(NamedTuple):
    """What decides on one task's tensor.

    Attributes:
        deviation: the standard deviation of its entries.
        norm: its trace norm, if `shrink` wants it; 0 of a vector.
    """

    deviation: float
    norm: float


class _Plan(NamedTuple):
    """What becomes of one task.

    Attributes:
        rates: tensor's name → its p; of others it is `drop`.
        factor: γ.
    """

    rates: Mapping[str, float]
    factor: float


_PLAIN = _Plan({}, 1.0)


@dataclass(frozen=True)
class DAREMerge(Merge):
    """Another merge, of task vectors of which most was dropped at random, the rest rescaled.

    Args:
        merge: what then merges them; none: their mean.
        drop: p, in [0, 1).
        seed: of the draws.

    Raises:
        CodecError: the probability is outside [0, 1).
    """

    id: ClassVar[str] = "dare"
    merge: Merge | None = None
    drop: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "merge", self.merge or Mean())
        _check(self.drop, "DAREMerge")

    def prepare(self, family: Family) -> MergeTensor:
        """What the merge prepares, of the vectors as they are left."""
        assert self.merge is not None  # once constructed
        merge_tensor = self.merge.prepare(family.changed(self._changes))
        return lambda vectors: merge_tensor(ChangedVectors(vectors, self._changes(vectors)))

    def _changes(self, vectors: TaskVectors) -> Sequence[Change]:
        return [_Drop(key_of(self.seed, task, vectors.name), self.drop) for task in vectors.tasks]


class _Drop:
    """Drops some entries of a task vector in place, and rescales the rest."""

    def __init__(self, key: int, drop: float) -> None:
        self._key, self._drop = key, drop

    def __call__(self, values: Tensor, place: slice) -> None:
        mask = kept(self._key, values.numel(), self._drop, values.device, place.start)
        values.mul_(mask).div_(1 - self._drop)


def key_of(seed: int, task: str, name: str) -> int:
    """The key of one tensor's draws: the first 8 bytes of a SHA-256, as int64."""
    digest = hashlib.sha256(f"{seed}\0{task}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def placed(
    deviations: Mapping[str, float], sizes: Mapping[str, int], drop: float, spread: float
) -> dict[str, float]:
    """How much to drop of each tensor: more where the entries deviate less, p in all.

    Args:
        deviations: tensor's name → the standard deviation of its entries.
        sizes: tensor's name → its number of entries; more names than these are no matter.
        drop: p.
        spread: d.

    Returns:
        name → one of p + d, p and p − d n_low / n_high, for n_low and n_high entries in the
        tensors of the least and the largest deviations.
    """
    total, seen = sum(sizes[name] for name in deviations), 0
    groups: tuple[list[str], ...] = ([], [], [])
    for name in sorted(deviations, key=deviations.__getitem__):
        seen += sizes[name]
        groups[0 if 3 * seen <= total else 1 if 3 * seen <= 2 * total else 2].append(name)
    low, _, high = (sum(sizes[name] for name in group) for group in groups)
    rates = (drop + spread, drop, drop - spread * low / max(high, 1))
    return {name: rate for group, rate in zip(groups, rates, strict=True) for name in group}


def kept(key: int, count: int, drop: float, device: torch.device, start: int = 0) -> Tensor:
    """Which entries are kept: bool `(count,)`, each with probability 1 − p.

    Entry i is kept where the hash of key and i (SplitMix64, Steele et al. 2014) falls below it.

    Args:
        key: of the draws.
        count: number of entries.
        drop: p.
        device: where to draw.
        start: i of the first entry.
    """
    limit = round((1 - drop) * _HASHES)
    mask = torch.empty(count, dtype=torch.bool, device=device)
    for first in range(0, count, _BLOCK):
        last = min(first + _BLOCK, count)
        hashed = torch.arange(start + first + 1, start + last + 1, device=device)
        hashed = hashed.mul_(_GOLDEN).add_(key)
        for shift, factor in _MIX:
            hashed = (hashed ^ _shifted(hashed, shift)).mul_(factor)
        hashed ^= _shifted(hashed, 31)
        torch.lt(_shifted(hashed, 64 - _BITS), limit, out=mask[first:last])
    return mask


def _shifted(values: Tensor, places: int) -> Tensor:
    """Shifted right as if unsigned."""
    return (values >> places) & ((1 << (64 - places)) - 1)


def _check(drop: float, what: str) -> None:
    if not 0 <= drop < 1:
        raise CodecError(f"expected {what}'s drop in [0, 1), got {drop}")
