"""Inner loops of codecs, compiled for the CPU: each reads its values once, within the cache.

PyTorch makes a pass over memory for every operation and takes Python's lock between any two; these
make one, without the lock. On other devices the same is done in PyTorch, by those that call these.
Numba compiles each at its first use, and keeps what it compiled beside this file, or else in the
user's cache folder.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
Floats = NDArray[np.float32]

_TILE = 1024
"""Entries that are worked on while they are in the first-level cache; a multiple of 8."""
_GATHER, _TOP = np.uint64(0x0102040810204080), np.uint64(56)
"""Eight bytes of 0 or 1, times the one and shifted by the other, are the bits of one byte."""
_BITS = (np.arange(256)[:, None] >> np.arange(8)) & 1
_SET = np.argsort(1 - _BITS, axis=1, kind="stable").astype(np.int32)
"""Where the bits of a byte are set, and how many are."""
_COUNT = _BITS.sum(1)


def _compiled(function: Function) -> Function:
    """Compile at the first call, before which Numba is not even imported.

    Sums may be taken in another order, so that they are vectorised.
    """
    made: Function | None = None

    @wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal made
        if made is None:
            made = _compile(function)
        return made(*arguments)

    return cast(Function, call)


def _compile(function: Function) -> Function:
    import numba

    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc"}}
    try:
        return cast(Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no folder that can be written to
        return cast(Function, numba.njit(**options)(function))


@_compiled
def elect(  # noqa: PLR0912
    vectors: Floats,
    elected: Floats,
    masks: NDArray[np.uint8],
    sums: NDArray[np.float64],
    first: int,
    given: bool,
    squared: bool,
) -> None:
    """EMR's election over a block, the tasks' masks, and the rescalers' sums (2405.17461).

    Args:
        vectors: the task vectors, `(T, n)`.
        elected: `(n,)`, filled with the elected vector τ_uni.
        masks: `(T, ceil(N / 8))` of the whole tensor, whose part of the block is filled: a bit
            where τ_t agrees with τ_uni in sign.
        sums: `(2, T)`, to which is added Σ|τ_t| and Σ M_t|τ_uni|.
        first: the block's place in the tensor; a multiple of 8.
        given: take τ_uni from `elected` instead of filling it.
        squared: to `sums` is added Σ M_t|τ_t||τ_uni| and Σ M_t τ_uni² instead.
    """
    tasks, count = vectors.shape
    sign = np.empty(_TILE, np.float32)
    magnitude = np.empty(_TILE, np.float32)
    bits = np.zeros(_TILE, np.uint8)
    words = bits.view(np.uint64)
    for start in range(0, count, _TILE):
        size = min(_TILE, count - start)
        unified = elected[start : start + size]
        if given:
            for i in range(size):
                sign[i] = 1 if unified[i] > 0 else -1
                magnitude[i] = abs(unified[i])
        else:
            sign[:size] = vectors[0, start : start + size]
            for task in range(1, tasks):
                row = vectors[task, start : start + size]
                for i in range(size):
                    sign[i] += row[i]
            for i in range(size):
                sign[i] = 1 if sign[i] > 0 else -1
                magnitude[i] = 0
            for task in range(tasks):
                row = vectors[task, start : start + size]
                for i in range(size):
                    magnitude[i] = max(magnitude[i], row[i] * sign[i])
            for i in range(size):
                unified[i] = magnitude[i] * sign[i]
        bits[size:] = 0
        for task in range(tasks):
            row = vectors[task, start : start + size]
            for i in range(size):
                bits[i] = (row[i] * sign[i] > 0) & (magnitude[i] > 0)
            if squared:
                product, square = 0.0, 0.0  # float64: squares would overflow
                for i in range(size):
                    kept = np.float64(magnitude[i] if bits[i] else np.float32(0))
                    product += abs(row[i]) * kept
                    square += kept * kept
                sums[0, task] += product
                sums[1, task] += square
            else:
                top, bottom = np.float32(0), np.float32(0)
                for i in range(size):
                    top += abs(row[i])
                    bottom += magnitude[i] if bits[i] else np.float32(0)
                sums[0, task] += top
                sums[1, task] += bottom
            mask = masks[task, (first + start) // 8 :]
            for i in range((size + 7) // 8):
                mask[i] = (words[i] * _GATHER) >> _TOP


@_compiled
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
    bits = np.zeros(_TILE, np.uint8)
    words = bits.view(np.uint64)
    places = np.empty(_TILE + 8, np.int32)
    for start in range(0, len(values), _TILE):
        tile = values[start : start + _TILE]
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
            byte = (words[word] * _GATHER) >> _TOP
            for j in range(8):  # those beyond what is set are written over
                places[here + j] = 8 * word + _SET[byte, j]
            here += _COUNT[byte]
        for j in range(here):
            positions[found + j] = first + start + places[j]
            kept[found + j] = tile[places[j]]
        found += here
    return found, ties


@_compiled
def up_to(values: Floats, limit: float, magnitudes: Floats) -> int:
    """The magnitudes that are not above a limit, into `magnitudes`, `(n,)`; how many."""
    found, bound = 0, np.float32(limit)
    for i in range(len(values)):
        magnitudes[found] = abs(values[i])
        found += abs(values[i]) <= bound
    return found


@_compiled
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


@_compiled
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


@_compiled
def quotients(positions: NDArray[np.integer[Any]], least: int) -> NDArray[np.int64]:
    """The sums of the gaps' quotients by 2^least, 2^(least + 1), 2^(least + 2), 2^(least + 3)."""
    sums = np.zeros(4, np.int64)
    before, after = positions[:-1], positions[1:]
    for more in range(4):
        shift = least + more
        total = np.int64(positions[0]) >> shift
        for i in range(len(after)):
            total += (after[i] - before[i] - 1) >> shift
        sums[more] = total
    return sums


@_compiled
def rice(
    positions: NDArray[np.integer[Any]],
    k: int,
    unary: NDArray[np.uint64],
    remainders: NDArray[np.uint64],
) -> None:
    """Code the gaps between positions; see `packing`.

    Args:
        positions: increasing, `(count,)`.
        k: bits of a remainder.
        unary: zeros, into which the quotients' bits are set; 64 bits each, one more than needed.
        remainders: the same of the remainders' bits, `k` streams of `count` bits.
    """
    count = len(positions)
    gaps = np.empty(64, np.uint64)
    end, before = np.int64(-1), np.int64(-1)
    for start in range(0, count, 64):
        size = min(64, count - start)
        for i in range(size):
            gaps[i] = positions[start + i] - before - 1
            before = np.int64(positions[start + i])
        word, place = np.uint64(0), end >> 6  # in a register until the next is begun
        for i in range(size):
            end += np.int64(gaps[i] >> np.uint64(k)) + 1
            if end >> 6 != place:
                if place >= 0:
                    unary[place] |= word
                word, place = np.uint64(0), end >> 6
            word |= np.uint64(1) << np.uint64(end & 63)
        unary[place] |= word
        for bit in range(k):
            word = np.uint64(0)
            for i in range(size):
                word |= ((gaps[i] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(i)
            first = bit * count + start
            shift = np.uint64(first & 63)
            remainders[first >> 6] |= word << shift
            if shift:
                remainders[(first >> 6) + 1] |= word >> (np.uint64(64) - shift)


@_compiled
def difference(tuned: Floats, base: Floats, out: Floats) -> bool:
    """θ_t − θ₀ of some entries, into `out`, which may be `tuned`; whether all of it is finite."""
    check = np.float32(0)
    for i in range(len(out)):
        out[i] = tuned[i] - base[i]
        check += out[i] * np.float32(0)
    return not np.isnan(check)


@_compiled
def difference_of_bfloat16(tuned: NDArray[np.uint16], base: Floats, out: Floats) -> bool:
    """The same of bfloat16, whose bits are the upper ones of a float32."""
    bits = np.empty(_TILE, np.uint32)
    values = bits.view(np.float32)
    check = np.float32(0)
    for start in range(0, len(out), _TILE):
        size = min(_TILE, len(out) - start)
        theirs, ours, delta = tuned[start:], base[start:], out[start:]
        for i in range(size):
            bits[i] = np.uint32(theirs[i]) << np.uint32(16)
        for i in range(size):
            delta[i] = values[i] - ours[i]
            check += delta[i] * np.float32(0)
    return not np.isnan(check)
