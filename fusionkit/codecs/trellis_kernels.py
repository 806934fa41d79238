"""Inner loops of `trellis`, compiled; imports Numba, so import it at first use only."""

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from fusionkit.task_vectors.compiled import Floats, compiled

Bytes = NDArray[np.uint8]

_WINDOW, _STATES, _HALF = 10, 1024, 512
_FAR = 64
"""Steps after which scores are brought near 0 again."""


@register_jitable
def _score(
    scores: Floats, numbers: Floats, at: int, count: int, columns: Floats, price: Floats
) -> None:
    """⟨x, x̂⟩ less the price of x̂, of a step's numbers, in all states."""
    for s in range(_STATES):
        scores[s] = -price[s]
    v = 0
    while v + 4 <= count:
        a, b, c, d = numbers[at + v], numbers[at + v + 1], numbers[at + v + 2], numbers[at + v + 3]
        p, q, r, u = columns[v], columns[v + 1], columns[v + 2], columns[v + 3]
        for s in range(_STATES):
            scores[s] += (a * p[s] + b * q[s]) + (c * r[s] + d * u[s])
        v += 4
    while v < count:
        a, p = numbers[at + v], columns[v]
        for s in range(_STATES):
            scores[s] += a * p[s]
        v += 1


@register_jitable
def _advance(best: Floats, better: Floats, chosen: Bytes) -> None:
    """From the best way to each state to the best on from there: a bit more, the oldest gone."""
    for q in range(_HALF):
        a, b = best[2 * q], best[2 * q + 1]
        chosen[q] = 1 if b > a else 0
        better[q] = b if b > a else a
    for q in range(_HALF):
        best[q] = better[q]
        best[q + _HALF] = better[q]


@compiled
def search(
    numbers: Floats, steps: int, first: int, last: int, columns: Floats, prices: Floats, bits: Bytes
) -> None:
    """Viterbi's algorithm over some steps, from any state to any.

    Args:
        numbers: all, `(N,)`.
        steps: n.
        first: the first step.
        last: the one after the last.
        columns: values, `(widest, 1024)`, of deviation 1.
        prices: of the first v of them, `(widest + 1, 1024)`.
        bits: `(last - first + 9,)` or more, a byte each, written.
    """
    count, length = len(numbers), last - first
    widest = (count + steps - 1) // steps
    if length < 1 or last > steps or len(bits) < length + _WINDOW - 1:
        raise ValueError("steps beyond the last, or room for fewer")
    if columns.shape != (widest, _STATES) or prices.shape != (widest + 1, _STATES):
        raise ValueError("values of another number of states, or of numbers a step")
    best, better = np.zeros(_STATES, np.float32), np.empty(_HALF, np.float32)
    scores, chosen = np.empty(_STATES, np.float32), np.empty((length, _HALF), np.uint8)
    at = first * count // steps
    for i in range(length):
        until = (first + i + 1) * count // steps
        if i:
            _advance(best, better, chosen[i])
        if until > at:
            _score(scores, numbers, at, until - at, columns, prices[until - at])
            for s in range(_STATES):
                best[s] += scores[s]
        if i % _FAR == 0:
            most = best.max()
            for s in range(_STATES):
                best[s] -= most
        at = until
    state = np.argmax(best)
    for bit in range(_WINDOW):
        bits[length - 1 + bit] = state >> bit & 1
    for i in range(length - 1, 0, -1):
        state = (state << 1 & (_STATES - 1)) | chosen[i, state & (_HALF - 1)]
        bits[i - 1] = state & 1
