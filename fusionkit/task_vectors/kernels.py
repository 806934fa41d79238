"""Inner loops of codecs, compiled for the CPU: each reads its values once, within the cache.

PyTorch makes a pass over memory for every operation and takes Python's lock between any two; these
make one, without the lock. On other devices the same is done in PyTorch, by those that call these.
Numba compiles each at its first use, and keeps what it compiled beside this file, or else in the
user's cache folder.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionkit.task_vectors.compiled import GATHER, TILE, TOP, Floats, compiled

_BITS = (np.arange(256)[:, None] >> np.arange(8)) & 1
_SET = np.argsort(1 - _BITS, axis=1, kind="stable").astype(np.int32)
"""Where the bits of a byte are set, and how many are."""
_COUNT = _BITS.sum(1)

LIMIT = np.float32(2.0**110)
"""No difference may be as large: there must be room for sums of them in float32."""


@compiled
def collect(
    values: Floats,
    limit: float,
    ties: int,
    first: int,
    positions: NDArray[np.integer[Any]],
    kept: Floats,
) -> tuple[int, int]:
    """The entries of a block whose magnitude is above a limit, and the first few that equal it.

    Args:
        values: the block, `(n,)`.
        limit: the magnitude, not negative.
        ties: how many that equal it are kept, at most.
        first: the block's place among all entries.
        positions: `(n,)`, whose first entries are filled with the places of what is kept.
        kept: `(n,)`, the same of its values.

    Returns:
        how many are kept, and how many ties there is still room for.
    """
    found, bound = 0, np.float32(limit)
    bits = np.zeros(TILE, np.uint8)
    words = bits.view(np.uint64)
    places = np.empty(TILE + 8, np.int32)
    for start in range(0, len(values), TILE):
        tile = values[start : start + TILE]
        size = len(tile)
        for i in range(size):
            bits[i] = abs(tile[i]) > bound
        bits[size:] = 0
        if ties:
            for i in range(size):
                if ties and abs(tile[i]) == bound:
                    bits[i] = 1
                    ties -= 1
        here = 0
        for word in range((size + 7) // 8):  # without a branch: it would be mispredicted
            byte = (words[word] * GATHER) >> TOP
            for j in range(8):  # those beyond what is set are written over
                places[here + j] = 8 * word + _SET[byte, j]
            here += _COUNT[byte]
        for j in range(here):
            positions[found + j] = first + start + places[j]
            kept[found + j] = tile[places[j]]
        found += here
    return found, ties


@compiled
def up_to(values: Floats, limit: float, magnitudes: Floats) -> int:
    """The magnitudes that are not above a limit, into `magnitudes`, `(n,)`; how many."""
    found, bound = 0, np.float32(limit)
    for i in range(len(values)):
        magnitudes[found] = abs(values[i])
        found += abs(values[i]) <= bound
    return found


@compiled
def drop(positions: NDArray[np.integer[Any]], values: Floats, limit: float, ties: int) -> int:
    """Keep, in place, the entries above a limit and the first few that equal it; how many."""
    found, bound = 0, np.float32(limit)
    for i in range(len(values)):
        magnitude = abs(values[i])
        taken = magnitude > bound
        if ties and magnitude == bound:
            taken = True
            ties -= 1
        positions[found] = positions[i]
        values[found] = values[i]
        found += taken
    return found


@compiled
def histogram(values: NDArray[np.int32], bin_: int, counts: NDArray[np.int64]) -> None:
    """Count how often the upper 16 bits of magnitudes occur, or the lower ones of those of a bin.

    Args:
        values: the bits of float32 values, `(n,)`.
        bin_: the upper bits whose lower ones are counted; −1: the upper ones are.
        counts: `(65536,)`, added to.
    """
    for i in range(len(values)):
        bits = values[i] & 0x7FFFFFFF
        if bin_ < 0:
            counts[bits >> 16] += 1
        elif bits >> 16 == bin_:
            counts[bits & 0xFFFF] += 1


@compiled
def difference(tuned: Floats, base: Floats, out: Floats) -> bool:
    """θ_t − θ₀ of some entries, into `out`, which may be `tuned`; whether none reaches `LIMIT`."""
    beyond = 0
    for i in range(len(out)):
        out[i] = tuned[i] - base[i]
        beyond |= not abs(out[i]) < LIMIT
    return beyond == 0


@compiled
def difference_of_bfloat16(tuned: NDArray[np.uint16], base: Floats, out: Floats) -> bool:
    """The same of bfloat16, whose bits are the upper ones of a float32."""
    bits = np.empty(TILE, np.uint32)
    values = bits.view(np.float32)
    beyond = 0
    for start in range(0, len(out), TILE):
        size = min(TILE, len(out) - start)
        theirs, ours, delta = tuned[start:], base[start:], out[start:]
        for i in range(size):
            bits[i] = np.uint32(theirs[i]) << np.uint32(16)
        for i in range(size):
            delta[i] = values[i] - ours[i]
            beyond |= not abs(delta[i]) < LIMIT
    return beyond == 0


def above(values: Tensor, limit: float) -> Tensor:
    """Where values are larger than a limit: bool, of the same shape."""
    if values.device.type == "cpu":  # NumPy is several times faster
        found: Any = np.greater(values.numpy(), np.float32(limit))
        return torch.from_numpy(found)
    return values > limit


def kth_largest(values: Tensor, k: int) -> float:
    """The k-th largest, from 1 on, of float32 `(n,)`."""
    if values.device.type == "cpu":  # NumPy is several times faster
        return float(np.partition(values.numpy(), -k)[-k])
    return float(torch.kthvalue(values, len(values) - k + 1).values)


def places(mask: Tensor) -> Tensor:
    """Flat positions at which a mask is set: int64, increasing."""
    if mask.device.type == "cpu":  # NumPy is several times faster on booleans
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero().reshape(-1)


def count_set(mask: Tensor) -> int:
    """At how many places a mask is set."""
    if mask.device.type == "cpu":  # NumPy is several times faster on booleans
        return int(np.count_nonzero(mask.numpy()))
    return int(torch.count_nonzero(mask))
