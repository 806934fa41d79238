"""Inner loops of codecs, compiled for the CPU: see `task_vectors.compiled`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusionkit.task_vectors.compiled import GATHER, TILE, TOP, Floats, compiled


def elect(
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

    Raises:
        ValueError: the arrays are of other sizes.
    """
    tasks, count = vectors.shape
    if elected.shape != (count,) or sums.shape != (2, tasks) or first % 8:
        raise ValueError("an elected vector, or sums, of other sizes than the vectors")
    if len(masks) != tasks or 8 * masks.shape[1] < first + count:
        raise ValueError("masks of other sizes than the vectors")
    _elect(vectors, elected, masks, sums, first, given, squared)


@compiled
def _elect(  # noqa: PLR0912
    vectors: Floats,
    elected: Floats,
    masks: NDArray[np.uint8],
    sums: NDArray[np.float64],
    first: int,
    given: bool,
    squared: bool,
) -> None:
    tasks, count = vectors.shape
    sign = np.empty(TILE, np.float32)
    magnitude = np.empty(TILE, np.float32)
    bits = np.zeros(TILE, np.uint8)
    words = bits.view(np.uint64)
    for start in range(0, count, TILE):
        size = min(TILE, count - start)
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
                mask[i] = (words[i] * GATHER) >> TOP


@compiled
def quotients(positions: NDArray[np.integer[Any]], least: int) -> NDArray[np.int64]:
    """The sums of the gaps' quotients by 2^least, 2^(least + 1), 2^(least + 2), 2^(least + 3)."""
    sums = np.zeros(4, np.int64)
    if not len(positions):
        return sums
    before, after = positions[:-1], positions[1:]
    for more in range(4):
        shift = least + more
        total = np.int64(positions[0]) >> shift
        for i in range(len(after)):
            total += (after[i] - before[i] - 1) >> shift
        sums[more] = total
    return sums


@compiled
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
    if 64 * (len(remainders) - 1) < count * k:
        raise ValueError("less room than remainders")
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
                if end >> 6 >= len(unary):
                    raise ValueError("less room than quotients")
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
