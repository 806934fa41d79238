"""Inner loops of `mixing`, compiled for the CPU; imports Numba, so import it at first use only.

Sixteen rows are a panel: run `b` of row `r` is at `256 b + 16 r`, so that runs of columns are mixed
as `rotation_kernels` mixes entries, 256 floats wide.
"""

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from fusionkit.codecs.rotation_kernels import Addend, Counts, Steps, check, half
from fusionkit.codecs.rotation_vectors import (
    LANES,
    LINES,
    ask_to_read,
    mixed,
    scaled,
    to_line,
    to_line_onto,
    to_lines,
    to_lines_onto,
)
from fusionkit.task_vectors.compiled import Floats, compiled

Bytes = NDArray[np.uint8]
Stream = tuple[Bytes, int, int, Floats]
"""A trellis: its bits, steps, numbers, and values as `trellis.table` has them."""
Groups = tuple[Counts, Floats, int]
"""Where each group's numbers start, −1 of one that is zero; its gain; and panels of a group."""

_WINDOW, _STATES, _SEGMENT, _COLUMNS, _APART = 10, 1024, 8192, 64, 613
"""As `trellis` has them."""
_SQUARE = LANES * LANES


@register_jitable
def _values(
    target: Floats, place: int, stream: Stream, begin: int, end: int, gain: float,
    read: Floats, ahead: int,
) -> None:  # fmt: skip
    """Values of some numbers of the trellis, times a gain, from `place` on.

    Runs of 16 are written, the rest of each overwritten by the next: there must be room before
    and behind. Meanwhile what is read next, from `ahead` on, comes from memory.
    """
    bits, steps, numbers, table = stream
    padded = table.shape[1]
    flat = table.reshape(-1)
    step = ((begin + 1) * steps - 1) // numbers
    at = step * numbers // steps
    place += at - begin
    few, more = numbers // steps, numbers % steps
    over = step * numbers % steps
    behind = step % _SEGMENT
    bit = step + step // _SEGMENT * (_WINDOW - 1)
    last = len(bits) - 1
    while at < end:
        count = few
        over += more
        if over >= steps:
            over -= steps
            count += 1
        if count:
            byte = bit >> 3
            word = np.int64(bits[byte]) | np.int64(bits[min(byte + 1, last)]) << 8
            word |= np.int64(bits[min(byte + 2, last)]) << 16
            state = word >> (bit & 7) & (_STATES - 1)
            ask_to_read(read, ahead)
            ahead += count
            if count <= LANES:
                scaled(target, place, flat, state * padded, gain)
            else:
                for v in range(0, count, LANES):
                    row = state + _APART * (v // _COLUMNS) & (_STATES - 1)
                    scaled(target, place + v, flat, row * padded + v % _COLUMNS, gain)
            place += count
            at += count
        bit += 1
        behind += 1
        if behind == _SEGMENT:
            behind = 0
            bit += _WINDOW - 1


@register_jitable
def _check_rows(
    matrix: Floats, work: Floats, side: Steps, signs: Floats, begin: int, end: int, size: int
) -> None:
    """Refuse rows beyond the matrix, and columns of another number than the runs'."""
    runs = len(side[2])
    if size < 1 or (size + LANES - 1) // LANES != runs or len(signs) != LANES * runs:
        raise ValueError("columns of another number than the runs'")
    if begin % LANES or end <= begin:
        raise ValueError("rows from the middle of a panel on, or none")
    check(side, work, begin, end, len(matrix) // size, _SQUARE)


@register_jitable
def _check_trellis(stream: Stream, groups: Groups, work: Floats, runs: int, end: int) -> int:
    """Refuse what is of other sizes than each other; the room before a panel's numbers."""
    bits, steps, numbers, table = stream
    starts, gains, height = groups
    if steps < 1 or numbers < 1 or height < 1:
        raise ValueError("nothing of a trellis, or of the rows")
    widest = (numbers + steps - 1) // steps
    room = (widest + LANES - 1) // LANES * LANES
    if work.shape[1] < _SQUARE * runs + 2 * room:
        raise ValueError("too little room")
    if table.shape[0] != _STATES or table.shape[1] < min(room, _COLUMNS):
        raise ValueError("a table of other values")
    needed = steps + (steps + _SEGMENT - 1) // _SEGMENT * (_WINDOW - 1)
    if len(bits) * 8 < needed or len(starts) != len(gains):
        raise ValueError("fewer bits than steps, or fewer gains than groups")
    if len(starts) * height * LANES < end:
        raise ValueError("groups of fewer rows than there are")
    return room


@register_jitable
def _write(
    target: Floats, panel: Floats, signs: Floats, added: Addend, row: int, rows: int, size: int
) -> None:
    """The first rows of a panel, times signs, and what is added, as rows from `row` on."""
    left, right, rank, base = added
    whole = size // LANES
    for r in range(rows):
        to, by, b = (row + r) * size, (row + r) * rank, 0
        while b + LINES <= whole:
            at, column = (b * LANES + r) * LANES, b * LANES
            if len(base):
                to_lines_onto(
                    target, to + column, size, panel, at, _SQUARE, signs, column, left, by, right,
                    rank, base,
                )  # fmt: skip
            else:
                to_lines(
                    target, to + column, size, panel, at, _SQUARE, signs, column, left, by, right,
                    rank, base,
                )  # fmt: skip
            b += LINES
        while b < whole:
            at, column = (b * LANES + r) * LANES, b * LANES
            if len(base):
                to_line_onto(
                    target, to + column, size, panel, at, _SQUARE, signs, column, left, by, right,
                    rank, base,
                )  # fmt: skip
            else:
                to_line(
                    target, to + column, size, panel, at, _SQUARE, signs, column, left, by, right,
                    rank, base,
                )  # fmt: skip
            b += 1
        for column in range(whole * LANES, size):
            value = panel[(whole * LANES + r) * LANES + column - whole * LANES] * signs[column]
            for k in range(rank):
                value += left[by + k] * right[k * size + column]
            target[to + column] = base[to + column] + value if len(base) else value


@compiled
def rebuild(
    stream: Stream, groups: Groups, target: Floats, work: Floats, side: Steps, signs: Floats,
    added: Addend, begin: int, end: int, size: int,
) -> None:  # fmt: skip
    """Rows of what was coded, and what is added to them.

    Args:
        stream: the trellis.
        groups: the rows'.
        target: `(m * size,)`, which the rows are written to.
        work: `(2, 256 * runs + 2 w)`, w the most numbers of a step, as a multiple of 16;
            overwritten.
        side: the mixing undone, of `runs` runs of columns.
        signs: of the columns, `(16 * runs,)`.
        added: what is added.
        begin: the first row, a multiple of 16.
        end: the row after the last.
        size: columns.
    """
    (windows, power, order, factors), (panel, other) = side, work
    left, right, rank, base = added
    starts, gains, height = groups
    runs, numbers = len(order), stream[2]
    _check_rows(target, work, side, signs, begin, end, size)
    room = _check_trellis(stream, groups, work, runs, end)
    if len(left) < end * rank or len(right) < rank * size:
        raise ValueError("factors of another size than the matrix")
    if len(base) and len(base) != len(target):
        raise ValueError("a base of another size than the matrix")
    for row in range(begin, end, LANES):
        tile = row // LANES
        group = tile // height
        if starts[group] < 0:
            other[: _SQUARE * runs] = 0
        else:
            first = starts[group] + (tile - group * height) * _SQUARE * runs
            if first + _SQUARE * runs > numbers:
                raise ValueError("entries beyond the numbers")
            last = first + _SQUARE * runs
            _values(panel, room, stream, first, last, gains[group], base, row * size)
            for b in range(runs):
                i = order[b]
                for r in range(LANES):
                    at = room + (i * LANES + r) * LANES
                    mixed(other, (b * LANES + r) * LANES, panel, at, factors[2, b])
                    i = i - 1 if i else runs - 1
            half(other, windows, power, factors[3], _SQUARE)
        _write(target, other, signs, added, row, min(LANES, end - row), size)


@compiled
def mix(
    matrix: Floats, target: Floats, work: Floats, side: Steps, signs: Floats, begin: int, end: int,
    size: int,
) -> None:  # fmt: skip
    """The other way: rows as the sequence.

    Args:
        matrix: `(m * size,)`.
        target: the sequence, `(256 * runs,)` of each panel; written.
        work: `(2, 256 * runs)`, overwritten.
        side: the mixing, of `runs` runs of columns.
        signs: of the columns, `(16 * runs,)`.
        begin: the first row, a multiple of 16.
        end: the row after the last.
        size: columns.
    """
    (windows, power, order, factors), panel = side, work[0]
    runs, whole, none = len(order), size // LANES, signs[:0]
    _check_rows(matrix, work, side, signs, begin, end, size)
    if len(target) < (end + LANES - 1) // LANES * _SQUARE * runs:
        raise ValueError("a sequence of another matrix")
    for row in range(begin, end, LANES):
        panel[: _SQUARE * runs] = 0
        for r in range(min(LANES, end - row)):
            at = (row + r) * size
            for b in range(whole):
                column = b * LANES
                to_line(
                    panel, (column + r) * LANES, size, matrix, at + column, 0, signs, column, none,
                    0, none, 0, none,
                )  # fmt: skip
            for column in range(whole * LANES, size):
                place = (whole * LANES + r) * LANES + column - whole * LANES
                panel[place] = matrix[at + column] * signs[column]
        half(panel, windows, power, factors[1], _SQUARE)
        start = row // LANES * _SQUARE * runs
        for b in range(runs):
            i = order[b]
            for r in range(LANES):
                to = start + (i * LANES + r) * LANES
                mixed(target, to, panel, (b * LANES + r) * LANES, factors[2, b])
                i = i - 1 if i else runs - 1
