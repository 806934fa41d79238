"""Inner loops of `trellis`, compiled; imports Numba, so import it at first use only."""

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from fusionkit.codecs.rotation_vectors import LANES, LINES, sum_products
from fusionkit.task_vectors.compiled import Floats, compiled

Bytes = NDArray[np.uint8]
Groups = tuple[NDArray[np.int64], NDArray[np.float64]]
"""The number after the last of each group, and what products count for in it."""

_WINDOW, _STATES, _HALF = 10, 1024, 512
_FAR = 64
"""Steps after which scores are brought near 0 again."""


@register_jitable
def _score(
    scores: Floats, starts: NDArray[np.int64], rows: Floats, numbers: Floats, steps: int,
    first: int, some: int, columns: Floats, prices: Floats,
) -> None:  # fmt: skip
    """⟨x, x̂⟩ less the price of x̂, of some steps' numbers, at most 8, in all states."""
    count, widest = len(numbers), columns.shape[1]
    at = first * count // steps
    for k in range(some):
        until = (first + k + 1) * count // steps
        starts[k] = (until - at) * _STATES
        for v in range(widest):
            rows[v * LINES + k] = numbers[at + v] if v < until - at else 0
        at = until
    flat, initial = columns.reshape(-1), prices.reshape(-1)
    for s in range(0, _STATES, LANES):
        sum_products(scores, s, _STATES, initial, starts, rows, flat, widest)


@register_jitable
def _advance(best: Floats, better: Floats, scores: Floats, chosen: Bytes) -> None:
    """From the best way to each state to the best on from there: a bit more, the oldest gone."""
    for q in range(_HALF):
        a, b = best[2 * q], best[2 * q + 1]
        chosen[q] = 1 if b > a else 0
        better[q] = b if b > a else a
    for q in range(_HALF):
        best[q] = better[q] + scores[q]
        best[q + _HALF] = better[q] + scores[q + _HALF]


@register_jitable
def _product(
    numbers: Floats, steps: int, first: int, length: int, columns: Floats, bits: Bytes,
    groups: Groups,
) -> float:  # fmt: skip
    """⟨x, x̂⟩ of the way that was found, each group's times what it counts for."""
    ends, weights = groups
    count, total, state = len(numbers), 0.0, np.int64(0)
    at = first * count // steps
    group = np.searchsorted(ends, at, "right")
    for bit in range(_WINDOW - 1):
        state |= np.int64(bits[bit]) << (bit + 1)
    for i in range(length):
        state = state >> 1 | np.int64(bits[i + _WINDOW - 1]) << (_WINDOW - 1)
        until = (first + i + 1) * count // steps
        for v in range(until - at):
            while at + v >= ends[group]:
                group += 1
            total += weights[group] * numbers[at + v] * columns[state // LANES, v, state % LANES]
        at = until
    return total


@compiled
def search(
    numbers: Floats, steps: int, first: int, last: int, columns: Floats, prices: Floats,
    groups: Groups, bits: Bytes,
) -> float:  # fmt: skip
    """Viterbi's algorithm over some steps, from any state to any.

    Args:
        numbers: all, `(N,)`.
        steps: n.
        first: the first step.
        last: the one after the last.
        columns: values, `(64, widest, 16)`, those of 16 states together; of deviation 1.
        prices: what the first v of them cost, negative, `(widest + 1, 1024)`.
        groups: of the numbers.
        bits: `(last - first + 9,)` or more, a byte each, written.

    Returns:
        the product of the numbers with their values.
    """
    count, length = len(numbers), last - first
    widest = (count + steps - 1) // steps
    if length < 1 or last > steps or len(bits) < length + _WINDOW - 1:
        raise ValueError("steps beyond the last, or room for fewer")
    if columns.shape != (_STATES // LANES, widest, LANES) or prices.shape != (widest + 1, _STATES):
        raise ValueError("values of another number of states, or of numbers a step")
    if len(groups[0]) != len(groups[1]) or groups[0][-1] != count:
        raise ValueError("groups of other numbers")
    best, better = np.zeros(_STATES, np.float32), np.empty(_HALF, np.float32)
    scores, rows = np.empty(LINES * _STATES, np.float32), np.empty(LINES * widest, np.float32)
    chosen, starts = np.empty((length, _HALF), np.uint8), np.zeros(LINES, np.int64)
    for i in range(length):
        k = i % LINES
        if not k:
            some = min(LINES, length - i)
            _score(scores, starts, rows, numbers, steps, first + i, some, columns, prices)
        own = scores[k * _STATES : (k + 1) * _STATES]
        if i:
            _advance(best, better, own, chosen[i])
        else:
            best[:] = own
        if i % _FAR == 0:
            best -= best.max()
    state = np.argmax(best)
    for bit in range(_WINDOW):
        bits[length - 1 + bit] = state >> bit & 1
    for i in range(length - 1, 0, -1):
        state = (state << 1 & (_STATES - 1)) | chosen[i, state & (_HALF - 1)]
        bits[i - 1] = state & 1
    return _product(numbers, steps, first, length, columns, bits, groups)
