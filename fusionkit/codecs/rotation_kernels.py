"""Inner loops of `rotation`, compiled for the CPU; imports Numba, so import it at first use only.

A *panel* is a flat array that holds `width` vectors side by side: entry `i` of vector `c` is at
`i * width + c`, and `width` is a multiple of 16. So every step works on runs of at least 16 floats,
a line of the cache, and a permutation copies whole runs. A matrix's columns lie so by nature; its
rows are transposed on the way in and out. What works on 16 floats is in `rotation_vectors`. Sizes
are checked once a call, before the loops; that positions lie in a matrix is the callers' business.
"""

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from fusionkit.codecs.rotation_vectors import (
    LANES,
    butterfly2,
    butterfly4,
    butterfly8,
    butterfly16,
    from_rows,
    scaled,
    scaled2,
    scaled4,
    scaled8,
    scaled16,
    to_rows,
    to_rows_onto,
)
from fusionkit.task_vectors.compiled import Floats, compiled

HEIGHT = LANES
"""Rows that are rotated at once."""

_COLUMNS = 32
"""Columns that are rotated at once, at most."""

_NEAR = 8192
"""Floats that stay in the first-level cache: 32 KB."""

Counts = NDArray[np.int64]
Steps = tuple[Counts, int, Counts, Floats]
"""A side's windows, power, order and factors: see `rotation_sides.Side`."""
Entries = tuple[Counts, Counts, Floats]
"""Where each panel's entries start, their places in the panel, and their values: see `panels`."""
Addend = tuple[Floats, Floats, int, Floats]
"""What is added to a rotated matrix: the left factor of a product, flat, `(m * rank,)`; the right
one, transposed and flat, `(rank * n,)`; the rank; and a matrix, flat, or an empty array."""


def width(columns: int) -> int:
    """How many of a matrix's columns are rotated at once."""
    return min(_COLUMNS, -(-columns // LANES) * LANES)


@register_jitable
def check(steps: Steps, work: Floats, begin: int, end: int, vectors: int, lanes: int) -> None:
    """Refuse steps that are of other sizes than each other, and vectors beyond the last."""
    windows, power, order, factors = steps
    size = len(order)
    if len(windows) != 2 or windows.min() < 0 or windows.max() + power > size:
        raise ValueError("windows beyond the vector")
    if factors.shape != (5, size) or work.shape[0] != 2 or work.shape[1] < lanes * size:
        raise ValueError("factors, or room, of another size than the vector")
    if begin < 0 or end > vectors:
        raise ValueError("vectors beyond the matrix")


@register_jitable
def _stage(panel: Floats, start: int, end: int, size: int, radix: int) -> None:
    """The stages of a transform that bring blocks of `size` floats to ones of `size / radix`."""
    stride = size // radix
    for block in range(start, end, size):
        for at in range(block, block + stride, LANES):
            if radix == 16:
                butterfly16(panel, at, stride)
            elif radix == 8:
                butterfly8(panel, at, stride)
            elif radix == 4:
                butterfly4(panel, at, stride)
            else:
                butterfly2(panel, at, stride)


@register_jitable
def _scaled_stage(
    panel: Floats, start: int, size: int, radix: int, factors: Floats, width: int
) -> None:
    """The same of one block, its entries times their factors first."""
    stride = size // radix
    step = stride // width
    for line in range(start // width, start // width + step):
        for at in range(line * width, (line + 1) * width, LANES):
            if radix == 16:
                scaled16(panel, at, stride, factors, line, step)
            elif radix == 8:
                scaled8(panel, at, stride, factors, line, step)
            elif radix == 4:
                scaled4(panel, at, stride, factors, line, step)
            else:
                scaled2(panel, at, stride, factors, line, step)


@register_jitable
def _radix(ratio: int) -> int:
    """Of the next stage, where there is so much left to do: 2^k, in as few stages as possible."""
    levels = 0
    while ratio >> (levels + 1):
        levels += 1
    stages = (levels + 3) // 4
    return 1 << ((levels + stages - 1) // stages)


@register_jitable
def _hadamard(
    panel: Floats, first: int, power: int, factors: Floats, scale: bool, width: int
) -> None:
    """Entries `first` to `first + power`, times factors if `scale`, times the matrix of ±1."""
    start, size = first * width, power * width
    end, least = start + size, size
    if scale and power == 1:
        for at in range(start, end, LANES):
            scaled(panel, at, panel, at, factors[first])
    elif scale:
        radix = _radix(power)
        _scaled_stage(panel, start, size, radix, factors, width)
        least //= radix
    while least > _NEAR and least > width:
        radix = _radix(least // width)
        _stage(panel, start, end, least, radix)
        least //= radix
    for block in range(start, end, least):
        part = least
        while part > width:
            radix = _radix(part // width)
            _stage(panel, block, block + least, part, radix)
            part //= radix


@register_jitable
def half(panel: Floats, windows: Counts, power: int, factors: Floats, width: int) -> None:
    """A transform of the first window; if there is another, of that, times factors."""
    _hadamard(panel, windows[0], power, factors, False, width)
    if windows[0] != windows[1]:
        _hadamard(panel, windows[1], power, factors, True, width)


@register_jitable
def _rotate(panel: Floats, other: Floats, steps: Steps, width: int) -> None:
    """All but the first and the last factors, from `panel` (which is used up) to `other`."""
    windows, power, order, factors = steps
    half(panel, windows, power, factors[1], width)
    for i in range(len(order)):
        at = order[i] * width
        for lane in range(0, width, LANES):
            scaled(other, i * width + lane, panel, at + lane, factors[2, i])
    half(other, windows, power, factors[3], width)


@register_jitable
def _write_columns(
    panel: Floats, matrix: Floats, factors: Floats, column: int, columns: int, width: int
) -> None:
    """The first `columns` of a panel's vectors, times factors, as columns of a matrix."""
    rows, whole = len(factors), columns - columns % LANES
    size = len(matrix) // rows
    for i in range(rows):
        at, place = i * size + column, i * width
        for lane in range(0, whole, LANES):
            scaled(matrix, at + lane, panel, place + lane, factors[i])
        for lane in range(whole, columns):
            matrix[at + lane] = panel[place + lane] * factors[i]


@register_jitable
def _write_rows(
    panel: Floats, matrix: Floats, factors: Floats, added: Addend, row: int, rows: int
) -> None:
    """The first `rows` of a panel's 16 vectors, times factors, and what is added, as rows."""
    left, right, rank, base = added
    size, start = len(factors), row * len(factors)
    whole = size - size % LANES if rows == LANES else 0
    for i in range(0, whole, LANES):
        at, to = i * LANES, start + i
        if len(base):
            to_rows_onto(matrix, to, size, panel, at, factors, i, left, row, right, rank, base)
        else:
            to_rows(matrix, to, size, panel, at, factors, i, left, row, right, rank, base)
    for lane in range(rows):
        at = start + lane * size
        for i in range(whole, size):
            value = panel[i * LANES + lane] * factors[i]
            for k in range(rank):
                value += left[(row + lane) * rank + k] * right[k * size + i]
            matrix[at + i] = base[at + i] + value if len(base) else value


@compiled
def rotate_columns(
    source: Floats, target: Floats, work: Floats, steps: Steps, begin: int, end: int
) -> None:
    """Rotate columns of a matrix.

    Args:
        source: the matrix, flat: `(m * n,)`, with `m = len(order)`.
        target: as many floats, which the columns are written to; may be `source`.
        work: `(2, width * m)`, overwritten; `width`, a multiple of 16, is how many columns are
            rotated at once.
        steps: the rotation of the side.
        begin: the first column.
        end: the column after the last.
    """
    (_, _, order, factors), (panel, other) = steps, work
    rows = len(order)
    size, width = len(source) // rows, len(panel) // rows
    check(steps, work, begin, end, size, LANES)
    if len(target) != len(source) or len(source) != rows * size or width % LANES:
        raise ValueError("a matrix of another size than its side")
    for column in range(begin, end, width):
        columns = min(width, end - column)
        whole = columns - columns % LANES
        for i in range(rows):
            at, place = i * size + column, i * width
            for lane in range(0, whole, LANES):
                scaled(panel, place + lane, source, at + lane, factors[0, i])
            for lane in range(whole, columns):
                panel[place + lane] = source[at + lane] * factors[0, i]
            if columns < width:
                panel[place + columns : place + width] = 0
        _rotate(panel, other, steps, width)
        _write_columns(other, target, factors[4], column, columns, width)


@compiled
def rotate_sparse_columns(
    entries: Entries, target: Floats, work: Floats, steps: Steps, begin: int, end: int
) -> None:
    """The same of a sparse matrix, as `panels` gives it; where all is zero, nothing is done."""
    (_, _, order, factors), (panel, other) = steps, work
    starts, places, values = entries
    width = len(panel) // len(order)
    size = len(target) // len(order)
    check(steps, work, begin, end, size, LANES)
    if len(target) != len(order) * size or width % LANES or len(places) != len(values):
        raise ValueError("a matrix of another size than its side")
    if len(starts) < (size + width - 1) // width + 1 or starts.max() > len(places):
        raise ValueError("panels beyond the entries")
    for column in range(begin, end, width):
        first, last = starts[column // width], starts[column // width + 1]
        panel[:] = 0
        for k in range(first, last):
            panel[places[k]] = values[k] * factors[0, places[k] // width]
        if first < last:
            _rotate(panel, other, steps, width)
        columns = min(width, end - column)
        _write_columns(other if first < last else panel, target, factors[4], column, columns, width)


@compiled
def panels(positions: Counts, values: Floats, size: int, width: int) -> Entries:
    """The entries of a sparse matrix, panel of columns by panel.

    Args:
        positions: the entries' places in the flat matrix, increasing, `(count,)`.
        values: the entries, `(count,)`.
        size: the matrix's columns.
        width: a panel's columns.

    Returns:
        where each panel's entries start, `(panels + 1,)`; each entry's place in its panel,
        `(count,)`; the entries, `(count,)`.
    """
    count = len(positions)
    if len(values) != count:
        raise ValueError("another number of values than of positions")
    columns = np.empty(count, np.int64)
    starts = np.zeros((size + width - 1) // width + 1, np.int64)
    for k in range(count):
        columns[k] = positions[k] % size
        starts[columns[k] // width + 1] += 1
    starts = np.cumsum(starts)
    free, places, kept = starts.copy(), np.empty(count, np.int64), np.empty(count, np.float32)
    for k in range(count):
        panel, lane = divmod(columns[k], width)
        places[free[panel]] = positions[k] // size * width + lane
        kept[free[panel]] = values[k]
        free[panel] += 1
    return starts, places, kept


@compiled
def rotate_rows(
    source: Floats,
    target: Floats,
    work: Floats,
    steps: Steps,
    added: Addend,
    begin: int,
    end: int,
) -> None:
    """Rotate rows of a matrix, and add to them.

    Args:
        source: the matrix, flat: `(m * n,)`, with `n = len(order)`.
        target: as many floats, which the rows are written to; may be `source`.
        work: `(2, 16 * n)`, overwritten.
        steps: the rotation of the side.
        added: what is added.
        begin: the first row.
        end: the row after the last.
    """
    (_, _, order, factors), (panel, other) = steps, work
    size = len(order)
    vectors = len(source) // size
    check(steps, work, begin, end, vectors, LANES)
    left, right, rank, base = added
    if len(target) != len(source) or len(source) != vectors * size:
        raise ValueError("a matrix of another size than its side")
    if len(left) != vectors * rank or len(right) != rank * size:
        raise ValueError("factors of another size than the matrix")
    if len(base) and len(base) != len(source):
        raise ValueError("a base of another size than the matrix")
    for row in range(begin, end, LANES):
        rows = min(LANES, end - row)
        whole = size - size % LANES if rows == LANES else 0
        start = row * size
        for i in range(0, whole, LANES):
            from_rows(panel, i * LANES, source, start + i, size, factors[0], i)
        for i in range(whole, size):
            for lane in range(rows):
                panel[i * LANES + lane] = source[start + lane * size + i] * factors[0, i]
            panel[i * LANES + rows : (i + 1) * LANES] = 0
        _rotate(panel, other, steps, LANES)
        _write_rows(other, target, factors[4], added, row, rows)
