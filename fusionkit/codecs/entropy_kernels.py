"""Inner loops of the entropy coder, compiled for the CPU; see `entropy` for the format.

Both take their models as `rows`, `(models, 5)` int64: where the model's part of `cumulative`
starts, how many frequencies it has, `last`, `low` and `signed` of its `Table`; and what is coded
as `runs`, `(runs, 2)` int64: a model's row, and a number of symbols.
"""

import numpy as np
from numpy.typing import NDArray

from fusionkit.codecs.entropy_tables import BUCKETS
from fusionkit.task_vectors.compiled import compiled

Integers = NDArray[np.int64]

START = 1 << 16
"""The state before anything is coded."""


def encode(
    symbols: NDArray[np.int32], runs: Integers, rows: Integers, cumulative: Integers
) -> tuple[np.int64, NDArray[np.uint16]]:
    """The state at the end, and the words in the order in which they are decoded.

    Raises:
        ValueError: the arrays are not of the sizes that each other's say.
    """
    _check(symbols, runs, rows, cumulative)
    return _encode(symbols, runs, rows, cumulative)


def decode(
    state: np.int64,
    words: NDArray[np.uint16],
    runs: Integers,
    rows: Integers,
    cumulative: Integers,
    first: NDArray[np.uint16],
    symbols: NDArray[np.int32],
) -> bool:
    """Fill `symbols`; whether the stream is one that `encode` makes of these runs.

    Nothing outside the arrays is read or written, whatever `state` and `words` are.

    Args:
        state: as `encode` returned it: in `[2^16, 2^48)`, from 2^32 on if there are words.
        words: likewise.
        runs: of the symbols.
        rows: of the models.
        cumulative: of all models, one after the other.
        first: of all models, `(models, 2^10)`.
        symbols: `(n,)`, n the sum of the runs' numbers.

    Raises:
        ValueError: the arrays are not of the sizes that each other's say.
    """
    _check(symbols, runs, rows, cumulative)
    if first.shape != (len(rows), 1 << BUCKETS):
        raise ValueError(f"expected {len(rows)} models' first indices, got {first.shape}")
    return _decode(state, words, runs, rows, cumulative, first, symbols)


def _check(
    symbols: NDArray[np.int32], runs: Integers, rows: Integers, cumulative: Integers
) -> None:
    """Refuse runs of other models, or of another number of symbols, than there are."""
    models, numbers = runs.T
    if len(runs) and not (0 <= models.min() <= models.max() < len(rows) and numbers.min() >= 0):
        raise ValueError(f"expected runs of {len(rows)} models, got {models}, {numbers}")
    if numbers.sum() != len(symbols):
        raise ValueError(f"expected {numbers.sum()} symbols, got {len(symbols)}")
    begins, sizes = rows[:, 0], rows[:, 1]
    if (rows[:, :2] < 0).any() or (begins + sizes >= len(cumulative)).any():
        raise ValueError(f"expected frequencies of {len(rows)} models, got {len(cumulative)}")


@compiled
def _encode(  # noqa: PLR0912
    symbols: NDArray[np.int32], runs: Integers, rows: Integers, cumulative: Integers
) -> tuple[np.int64, NDArray[np.uint16]]:
    room, at = 0, 0
    for run in range(len(runs)):  # steps put away a word each at most
        _, size, last, low, _ = rows[runs[run, 0]]
        escapes = 0
        for i in range(at, at + runs[run, 1]):
            escapes += abs(np.int64(symbols[i]) >> low) > last
        room += runs[run, 1] * ((low + 15) // 16 + (size > 0)) + escapes * (size > 0) * 3
        at += runs[run, 1]
    words = np.empty(room, np.uint16)
    state, place = np.int64(START), room  # filled from its end
    for run in range(len(runs) - 1, -1, -1):
        begin, size, last, low, signed = rows[runs[run, 0]]
        offset = last + 1 if signed else min(size, 1)
        for _ in range(runs[run, 1]):
            at -= 1
            value = np.int64(symbols[at])
            rest, extra, bits = value >> low, value & ((1 << low) - 1), low
            index, length, beyond = rest + offset, 0, abs(rest) - last
            escaped = size > 0 and beyond > 0
            if escaped:
                while beyond >> (length + 1):
                    length += 1
                extra |= (beyond - (1 << length)) << bits
                bits += length
                index = 0
                if signed:
                    extra |= np.int64(rest < 0) << bits
                    bits += 1
            while bits:
                step = (bits - 1) % 16 + 1
                bits -= step
                if state >> (48 - step):
                    place -= 1
                    words[place] = state & 0xFFFF
                    state >>= 16
                state = state << step | extra >> bits
                extra &= (1 << bits) - 1
            if escaped:
                if state >> 43:
                    place -= 1
                    words[place] = state & 0xFFFF
                    state >>= 16
                state = state << 5 | length
            if size:
                start = cumulative[begin + index]
                frequency = cumulative[begin + index + 1] - start
                if state >= frequency << 32:
                    place -= 1
                    words[place] = state & 0xFFFF
                    state >>= 16
                quotient = np.int64(np.uint64(state) // np.uint64(frequency))
                state = (quotient << 16) + state - quotient * frequency + start
    return state, words[place:].copy()


@compiled
def _decode(
    state: np.int64,
    words: NDArray[np.uint16],
    runs: Integers,
    rows: Integers,
    cumulative: Integers,
    first: NDArray[np.uint16],
    symbols: NDArray[np.int32],
) -> bool:
    place, at = 0, 0
    for run in range(len(runs)):
        begin, size, last, low, signed = rows[runs[run, 0]]
        starts, buckets = cumulative[begin : begin + size + 1], first[runs[run, 0]]
        offset = last + 1 if signed else min(size, 1)
        for _ in range(runs[run, 1]):
            index, bits, length = np.int64(0), low, np.int64(0)
            if size:
                slot = state & 0xFFFF
                index = np.int64(buckets[slot >> 6])
                while starts[index + 1] <= slot:
                    index += 1
                start = starts[index]
                state = (starts[index + 1] - start) * (state >> 16) + slot - start
                if state >> 32 == 0 and place < len(words):
                    state = state << 16 | np.int64(words[place])
                    place += 1
                if index == 0:
                    length = state & 31
                    state >>= 5
                    if state >> 32 == 0 and place < len(words):
                        state = state << 16 | np.int64(words[place])
                        place += 1
                    bits += length + signed
            extra, got = np.int64(0), np.int64(0)
            while got < bits:
                step = min(bits - got, np.int64(16))
                extra |= (state & ((1 << step) - 1)) << got
                got += step
                state >>= step
                if state >> 32 == 0 and place < len(words):
                    state = state << 16 | np.int64(words[place])
                    place += 1
            rest = index - offset
            if index == 0 and size:
                rest = last + (1 << length) + ((extra >> low) & ((1 << length) - 1))
                if signed and extra >> (length + low):
                    rest = -rest
            value = rest << low | extra & ((1 << low) - 1)
            if state < START or value < -(1 << 31) or value >= 1 << 31:
                return False
            symbols[at] = value
            at += 1
    return bool(state == START and place == len(words))
