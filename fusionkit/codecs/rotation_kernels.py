"""Inner loops of `rotation`, compiled for the CPU; imports Numba, so import it at first use only.

A *panel* is a flat array that holds `width` vectors side by side: entry `i` of vector `c` is at
`i * width + c`, and `width` is a multiple of 16. So every step works on runs of at least 16 floats,
a line of the cache, and a permutation copies whole runs. A matrix's columns lie so by nature; its
rows are transposed on the way in and out. What works on 16 floats is written as LLVM vectors, which
become registers of whatever width the processor has. Bounds are the callers' business.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, register_jitable
from numpy.typing import NDArray

from fusionkit.task_vectors.compiled import Floats, compiled

LANES = 16
"""Floats that are worked on at once; rows that are rotated at once."""

_COLUMNS = 32
"""Columns that are rotated at once, at most."""

_NEAR = 8192
"""Floats that stay in the first-level cache: 32 KB."""

_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_INT = types.intp
_Value = Any
"""A value of the code that is built: llvmlite has no types for it."""

_intrinsic = cast(Callable[[Callable[..., Any]], Callable[..., None]], intrinsic)

Counts = NDArray[np.int64]
Steps = tuple[Counts, int, Counts, Floats]
"""A side's windows, power, order and factors: see `rotation.Side`."""
Entries = tuple[Counts, Counts, Floats]
"""Where each panel's entries start, their places in the panel, and their values: see `panels`."""


def width(columns: int) -> int:
    """How many of a matrix's columns are rotated at once."""
    return min(_COLUMNS, -(-columns // LANES) * LANES)


def _place(context: Any, builder: Any, kind: Any, array: _Value, offset: _Value) -> _Value:
    """A pointer to the 16 floats at an offset of a flat array."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), _VECTOR.as_pointer())


def _butterfly(radix: int) -> Callable[..., None]:
    """The Hadamard transform of `radix` runs of 16 floats, in place and within registers."""

    @_intrinsic
    def butterfly(context: Any, array: Any, start: Any, stride: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, given: Any) -> _Value:
            array, at, stride = given
            places = []
            for _ in range(radix):
                places.append(_place(context, builder, signature.args[0], array, at))
                at = builder.add(at, stride)
            runs = [builder.load(place, align=4) for place in places]
            half = 1
            while half < radix:
                for i in range(radix):
                    if not i & half:
                        a, b = runs[i], runs[i + half]
                        runs[i], runs[i + half] = builder.fadd(a, b), builder.fsub(a, b)
                half *= 2
            for run, place in zip(runs, places, strict=True):
                builder.store(run, place, align=4)
            return context.get_dummy_value()

        return types.void(array, _INT, _INT), build

    return butterfly


_butterfly2, _butterfly4, _butterfly8 = _butterfly(2), _butterfly(4), _butterfly(8)


@_intrinsic
def _scaled(context: Any, target: Any, to: Any, source: Any, at: Any, factor: Any) -> Any:
    """`target[to : to + 16] = source[at : at + 16] * factor`."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> _Value:
        target, to, source, at, factor = given
        place = _place(context, builder, signature.args[0], target, to)
        run = builder.load(_place(context, builder, signature.args[2], source, at), align=4)
        none, zero = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        one = builder.insert_element(none, factor, zero)
        factors = builder.shuffle_vector(one, none, _lanes([0] * LANES))
        builder.store(builder.fmul(run, factors), place, align=4)
        return context.get_dummy_value()

    return types.void(target, _INT, source, _INT, types.float32), build


def _transpose(first: bool) -> Callable[..., None]:
    """16 × 16 floats transposed; each row that is read (`first`) or written times 16 factors."""

    @_intrinsic
    def transpose(
        context: Any,
        target: Any,
        to: Any,
        stride: Any,
        source: Any,
        at: Any,
        step: Any,
        factors: Any,
        place: Any,
    ) -> Any:
        def build(context: Any, builder: Any, signature: Any, given: Any) -> _Value:
            target, to, stride, source, at, step, factors, place = given
            kinds = signature.args
            factor = builder.load(_place(context, builder, kinds[6], factors, place), align=4)
            runs = []
            for _ in range(LANES):
                run = builder.load(_place(context, builder, kinds[3], source, at), align=4)
                runs.append(builder.fmul(run, factor) if first else run)
                at = builder.add(at, step)
            for run in _transposed(builder, runs):
                done = run if first else builder.fmul(run, factor)
                builder.store(done, _place(context, builder, kinds[0], target, to), align=4)
                to = builder.add(to, stride)
            return context.get_dummy_value()

        given = (target, _INT, _INT, source, _INT, _INT, factors, _INT)
        return types.void(*given), build

    return transpose


_from_rows, _to_rows = _transpose(True), _transpose(False)


def _transposed(builder: Any, runs: list[_Value]) -> list[_Value]:
    """16 runs of 16 as a square, transposed by swapping blocks of 8 × 8, then 4 × 4, 2 × 2, 1."""
    done = list(runs)
    for size in (8, 4, 2, 1):
        upper = [i if not i & size else LANES + i - size for i in range(LANES)]
        lower = [i + size if not i & size else LANES + i for i in range(LANES)]
        for i in range(LANES):
            if not i & size:
                a, b = done[i], done[i + size]
                done[i] = builder.shuffle_vector(a, b, _lanes(upper))
                done[i + size] = builder.shuffle_vector(a, b, _lanes(lower))
    return done


def _lanes(places: list[int]) -> _Value:
    return ir.Constant(ir.VectorType(ir.IntType(32), LANES), places)


@register_jitable
def _stages(panel: Floats, start: int, end: int, size: int, least: int) -> None:
    """The stages of a Hadamard transform that bring blocks of `size` floats to ones of `least`."""
    while size > least:
        if size >= 8 * least:
            stride = size >> 3
            for block in range(start, end, size):
                for at in range(block, block + stride, LANES):
                    _butterfly8(panel, at, stride)
        elif size == 4 * least:
            stride = size >> 2
            for block in range(start, end, size):
                for at in range(block, block + stride, LANES):
                    _butterfly4(panel, at, stride)
        else:
            stride = size >> 1
            for block in range(start, end, size):
                for at in range(block, block + stride, LANES):
                    _butterfly2(panel, at, stride)
        size = stride


@register_jitable
def _hadamard(panel: Floats, first: int, power: int, width: int) -> None:
    """Entries `first` to `first + power` of a panel's vectors times the matrix of ±1."""
    start, size = first * width, power * width
    near = size
    while near > _NEAR:
        near >>= 3
    near = max(near, width)
    _stages(panel, start, start + size, size, near)
    for block in range(start, start + size, near):
        _stages(panel, block, block + near, near, width)


@register_jitable
def _half(panel: Floats, windows: Counts, power: int, factors: Floats, width: int) -> None:
    """A transform of the first window; if there is another, factors and a transform of that."""
    _hadamard(panel, windows[0], power, width)
    if windows[0] != windows[1]:
        for i in range(len(factors)):
            for at in range(i * width, (i + 1) * width, LANES):
                _scaled(panel, at, panel, at, factors[i])
        _hadamard(panel, windows[1], power, width)


@register_jitable
def _rotate(panel: Floats, other: Floats, steps: Steps, width: int) -> None:
    """All but the first and the last factors, from `panel` (which is used up) to `other`."""
    windows, power, order, factors = steps
    _half(panel, windows, power, factors[1], width)
    for i in range(len(order)):
        at = order[i] * width
        for lane in range(0, width, LANES):
            _scaled(other, i * width + lane, panel, at + lane, factors[2, i])
    _half(other, windows, power, factors[3], width)


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
            _scaled(matrix, at + lane, panel, place + lane, factors[i])
        for lane in range(whole, columns):
            matrix[at + lane] = panel[place + lane] * factors[i]


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
    for column in range(begin, end, width):
        columns = min(width, end - column)
        whole = columns - columns % LANES
        for i in range(rows):
            at, place = i * size + column, i * width
            for lane in range(0, whole, LANES):
                _scaled(panel, place + lane, source, at + lane, factors[0, i])
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
def rotate_rows(matrix: Floats, work: Floats, steps: Steps, begin: int, end: int) -> None:
    """Rotate rows of a matrix in place.

    Args:
        matrix: flat, `(m * n,)`, with `n = len(order)`.
        work: `(2, 16 * n)`, overwritten.
        steps: the rotation of the side.
        begin: the first row.
        end: the row after the last.
    """
    (_, _, order, factors), (panel, other) = steps, work
    size = len(order)
    for row in range(begin, end, LANES):
        rows = min(LANES, end - row)
        whole = size - size % LANES if rows == LANES else 0
        for i in range(0, whole, LANES):
            _from_rows(panel, i * LANES, LANES, matrix, row * size + i, size, factors[0], i)
        for i in range(whole, size):
            for lane in range(rows):
                panel[i * LANES + lane] = matrix[(row + lane) * size + i] * factors[0, i]
            panel[i * LANES + rows : (i + 1) * LANES] = 0
        _rotate(panel, other, steps, LANES)
        for i in range(0, whole, LANES):
            _to_rows(matrix, row * size + i, size, other, i * LANES, LANES, factors[4], i)
        for lane in range(rows):
            for i in range(whole, size):
                matrix[(row + lane) * size + i] = other[i * LANES + lane] * factors[4, i]
