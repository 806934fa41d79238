"""DARE: drop most of a task vector at random, and rescale the rest (Yu et al., 2311.03099)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionkit import (
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
from fusionkit.codecs.values import ValueDtype, pack_values, unpack_values
from fusionkit.errors import CodecError
from fusionkit.task_vectors import Change, ChangedVectors

_BITS = 53
"""Of each hash, so many bits are compared; the probability is exact to 2⁻⁵³."""
_BLOCK = 1 << 20
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


@dataclass(frozen=True)
class DARE(DeltaCodec):
    """Keep each entry with probability 1 − p, divided by 1 − p.

    Which entries are kept follows from a key of 8 bytes a tensor, so that only their values are
    stored: 16 (1 − p) bits per parameter in fp16. The same seed keeps the same entries wherever,
    and with whatever device and version of torch, a bundle is read.

    Args:
        drop: p, in [0, 1).
        seed: of the draws.
        dtype: how the kept values are stored.

    Raises:
        CodecError: the probability is outside [0, 1).
    """

    id: ClassVar[str] = "dare"
    drop: float = 0.9
    seed: int = 0
    dtype: ValueDtype = "fp16"

    def __post_init__(self) -> None:
        _check(self.drop, "DARE")

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """Nothing to prepare: tensor by tensor, task by task."""
        return Encoder(self._encode)

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """τ_t / (1 − p) where it was kept."""
        device = parts["values"].device
        mask = kept(int(parts["key"]), shape.numel(), self.drop, device)
        delta = torch.zeros(shape.numel(), device=device)
        values = unpack_values(parts, int(mask.sum()), self.dtype)
        delta[mask] = values.div_(1 - self.drop)
        return delta.view(shape)

    def _encode(self, vectors: TaskVectors) -> Encoded:
        own = []
        for task, name in enumerate(vectors.tasks):
            flat = vectors[task].view(-1)
            key = key_of(self.seed, name, vectors.name)
            values = flat[kept(key, flat.numel(), self.drop, flat.device)]
            parts = {"key": torch.tensor([key]), **pack_values(values, self.dtype)}
            own.append(parts if values.any() else {})
        return Encoded(vectors.name, tasks=own)


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
    limit = round((1 - drop) * (1 << _BITS))
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
