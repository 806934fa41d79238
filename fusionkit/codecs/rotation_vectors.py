"""What works on 16 floats at once, written as LLVM vectors: for the compiled loops of a sketch.

They become registers of whatever width the processor has. Offsets are in floats, of flat arrays;
bounds are the callers' business. Imports Numba, so import it at first use only.
"""

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba.core import cgutils as _cgutils
from numba.core import types
from numba.extending import intrinsic

LANES = 16
"""Floats that are worked on at once."""
LINES = 8
"""Times that, of a row that is written; and sums that are taken at once."""

_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_INT = types.intp
_Value = Any
"""A value of the code that is built: llvmlite has no types for it."""

cgutils: Any = _cgutils  # without types
_intrinsic = cast(Callable[[Callable[..., Any]], Callable[..., None]], intrinsic)


class _Run:
    """Builds reads and writes of 16 floats of one array that an intrinsic was given."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: _Value) -> None:
        self._builder = builder
        self._data = context.make_array(kind)(context, builder, array).data

    def load(self, offset: _Value) -> _Value:
        return self._builder.load(self._place(offset), align=4)

    def store(self, value: _Value, offset: _Value) -> None:
        self._builder.store(value, self._place(offset), align=4)

    def spread(self, offset: _Value) -> _Value:
        """One float, 16 times."""
        return spread(self._builder, self._builder.load(self._builder.gep(self._data, [offset])))

    def _place(self, offset: _Value) -> _Value:
        return self._builder.bitcast(self._builder.gep(self._data, [offset]), _VECTOR.as_pointer())


def spread(builder: Any, value: _Value) -> _Value:
    """A float as 16 of it."""
    none, zero = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.IntType(32), 0)
    one = builder.insert_element(none, value, zero)
    return builder.shuffle_vector(one, none, _lanes([0] * LANES))


def _butterfly(radix: int) -> Callable[..., None]:
    """The Hadamard transform of `radix` runs of 16 floats, `stride` apart, within registers."""

    @_intrinsic
    def butterfly(context: Any, array: Any, start: Any, stride: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, given: Any) -> _Value:
            array, at, stride = given
            panel = _Run(context, builder, signature.args[0], array)
            places = _places(builder, at, stride, radix)
            runs = _transformed(builder, [panel.load(place) for place in places])
            for run, place in zip(runs, places, strict=True):
                panel.store(run, place)
            return context.get_dummy_value()

        return types.void(array, _INT, _INT), build

    return butterfly


def _scaled_butterfly(radix: int) -> Callable[..., None]:
    """The same of runs that are first multiplied by a factor each, `step` apart."""

    @_intrinsic
    def butterfly(
        context: Any, array: Any, start: Any, stride: Any, factors: Any, first: Any, step: Any
    ) -> Any:
        def build(context: Any, builder: Any, signature: Any, given: Any) -> _Value:
            array, at, stride, factors, first, step = given
            panel = _Run(context, builder, signature.args[0], array)
            by = _Run(context, builder, signature.args[3], factors)
            places = _places(builder, at, stride, radix)
            runs = [
                builder.fmul(panel.load(place), by.spread(factor))
                for place, factor in zip(places, _places(builder, first, step, radix), strict=True)
            ]
            for run, place in zip(_transformed(builder, runs), places, strict=True):
                panel.store(run, place)
            return context.get_dummy_value()

        return types.void(array, _INT, _INT, factors, _INT, _INT), build

    return butterfly


butterfly2, butterfly4, butterfly8, butterfly16 = map(_butterfly, (2, 4, 8, 16))
scaled2, scaled4, scaled8, scaled16 = map(_scaled_butterfly, (2, 4, 8, 16))


@_intrinsic
def scaled(context: Any, target: Any, to: Any, source: Any, at: Any, factor: Any) -> Any:
    """`target[to : to + 16] = source[at : at + 16] * factor`."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> _Value:
        target, to, source, at, factor = given
        run = _Run(context, builder, signature.args[2], source).load(at)
        done = builder.fmul(run, spread(builder, factor))
        _Run(context, builder, signature.args[0], target).store(done, to)
        return context.get_dummy_value()

    return types.void(target, _INT, source, _INT, types.float32), build


@_intrinsic
def mixed(context: Any, target: Any, to: Any, source: Any, at: Any, factor: Any) -> Any:
    """The same, after a Hadamard transform of the 16."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> _Value:
        target, to, source, at, factor = given
        run = _Run(context, builder, signature.args[2], source).load(at)
        none = ir.Constant(_VECTOR, ir.Undefined)
        for half in (8, 4, 2, 1):
            signs = ir.Constant(_VECTOR, [-1.0 if i & half else 1.0 for i in range(LANES)])
            other = builder.shuffle_vector(run, none, _lanes([i ^ half for i in range(LANES)]))
            run = _multiply_add(builder, run, signs, other)
        done = builder.fmul(run, spread(builder, factor))
        _Run(context, builder, signature.args[0], target).store(done, to)
        return context.get_dummy_value()

    return types.void(target, _INT, source, _INT, types.float32), build


@_intrinsic
def sum_products(
    context: Any,
    sums: Any,
    at: Any,
    apart: Any,
    initial: Any,
    starts: Any,
    by: Any,
    runs: Any,
    count: Any,
) -> Any:
    """Eight runs of sums, `apart`, from `at` on: of a run and `count` products of numbers and runs.

    `sums[k apart + at] = initial[starts[k] + at] + Σ_v by[8 v + k] runs[at count + 16 v]`;
    all are flat.
    """

    def build(context: Any, builder: Any, signature: Any, given: Any) -> _Value:
        sums, at, apart, initial, starts, by, runs, count = given
        kinds, eight = signature.args, ir.Constant(ir.IntType(64), LINES)
        first = _Run(context, builder, kinds[3], initial)
        offsets = context.make_array(kinds[4])(context, builder, starts).data
        numbers = _Run(context, builder, kinds[5], by)
        source = _Run(context, builder, kinds[6], runs)
        kept = []
        for k in range(LINES):
            offset = builder.load(builder.gep(offsets, [ir.Constant(ir.IntType(64), k)]))
            kept.append(cgutils.alloca_once(builder, _VECTOR))
            builder.store(first.load(builder.add(offset, at)), kept[-1])
        one_more, first_run = ir.Constant(ir.IntType(64), 1), builder.mul(at, count)
        with cgutils.for_range(builder, count) as loop:
            run = source.load(builder.add(builder.mul(loop.index, _INT_LANES), first_run))
            places = _places(builder, builder.mul(loop.index, eight), one_more, LINES)
            for one, place in zip(kept, places, strict=True):
                number = numbers.spread(place)
                builder.store(_multiply_add(builder, number, run, builder.load(one)), one)
        target = _Run(context, builder, kinds[0], sums)
        for place, one in zip(_places(builder, at, apart, LINES), kept, strict=True):
            target.store(builder.load(one), place)
        return context.get_dummy_value()

    return types.void(sums, _INT, _INT, initial, starts, by, runs, _INT), build


@_intrinsic
def ask_to_read(context: Any, array: Any, at: Any) -> Any:
    """Ask for a line of memory that is to be read soon."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> _Value:
        data = context.make_array(signature.args[0])(context, builder, given[0]).data
        pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        place = builder.bitcast(builder.gep(data, [given[1]]), pointer)
        builder.call(function, [place, *(ir.Constant(flag, value) for value in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, _INT), build


@_intrinsic
def from_rows(
    context: Any, panel: Any, to: Any, matrix: Any, at: Any, size: Any, factors: Any, first: Any
) -> Any:
    """16 columns of 16 rows, `size` apart, times a factor each column, as 16 runs of a panel."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> _Value:
        panel, to, matrix, at, size, factors, first = given
        kinds = signature.args
        factor = _Run(context, builder, kinds[5], factors).load(first)
        source = _Run(context, builder, kinds[2], matrix)
        rows = [source.load(place) for place in _places(builder, at, size, LANES)]
        target = _Run(context, builder, kinds[0], panel)
        ones = _transposed(builder, [builder.fmul(row, factor) for row in rows])
        for one, place in zip(ones, _places(builder, to, _INT_LANES, LANES), strict=True):
            target.store(one, place)
        return context.get_dummy_value()

    return types.void(panel, _INT, matrix, _INT, _INT, factors, _INT), build


def _to_rows(onto: bool) -> Callable[..., None]:
    """The other way, with what is added: 16 columns, from `first` on, of 16 rows, from `row` on.

    `panelᵀ * factors + left @ right`, plus (`onto`) the same part of a base, which is last; `left`
    is `(rows, rank)`, `right` `(rank, size)`, both flat.
    """

    @_intrinsic
    def to_rows(
        context: Any,
        matrix: Any,
        to: Any,
        size: Any,
        panel: Any,
        at: Any,
        factors: Any,
        first: Any,
        left: Any,
        row: Any,
        right: Any,
        rank: Any,
        base: Any,
    ) -> Any:
        def build(context: Any, builder: Any, signature: Any, given: Any) -> _Value:
            matrix, to, size, panel, at, factors, first, left, row, right, rank, base = given
            kinds = signature.args
            factor = _Run(context, builder, kinds[5], factors).load(first)
            source = _Run(context, builder, kinds[3], panel)
            runs = [source.load(place) for place in _places(builder, at, _INT_LANES, LANES)]
            sums = []
            for run in _transposed(builder, runs):
                sums.append(cgutils.alloca_once(builder, _VECTOR))
                builder.store(builder.fmul(run, factor), sums[-1])
            lefts = _Run(context, builder, kinds[7], left)
            rights = _Run(context, builder, kinds[9], right)
            with cgutils.for_range(builder, rank) as loop:
                column = rights.load(builder.add(builder.mul(loop.index, size), first))
                place = builder.add(builder.mul(row, rank), loop.index)
                for kept, one in zip(sums, _places(builder, place, rank, LANES), strict=True):
                    factors = lefts.spread(one)
                    more = _multiply_add(builder, factors, column, builder.load(kept))
                    builder.store(more, kept)
            target = _Run(context, builder, kinds[0], matrix)
            start = _Run(context, builder, kinds[11], base)
            for kept, place in zip(sums, _places(builder, to, size, LANES), strict=True):
                done = builder.load(kept)
                target.store(builder.fadd(start.load(place), done) if onto else done, place)
            return context.get_dummy_value()

        given = (matrix, _INT, _INT, panel, _INT, factors, _INT, left, _INT, right, _INT, base)
        return types.void(*given), build

    return to_rows


to_rows, to_rows_onto = _to_rows(False), _to_rows(True)


def _to_line(onto: bool, count: int) -> Callable[..., None]:
    """Runs of 16 floats of a row: `run * factors + left @ right`, plus (`onto`) a base's, last.

    The runs of the panel are `apart`; `left` is of the row, from `row` on, `right` `(rank, size)`,
    flat, from column `first` on.
    """

    @_intrinsic
    def to_line(
        context: Any,
        matrix: Any,
        to: Any,
        size: Any,
        panel: Any,
        at: Any,
        apart: Any,
        factors: Any,
        first: Any,
        left: Any,
        row: Any,
        right: Any,
        rank: Any,
        base: Any,
    ) -> Any:
        def build(context: Any, builder: Any, signature: Any, given: Any) -> _Value:
            matrix, to, size, panel, at, apart, factors, first, left, row, right, rank, base = given
            kinds = signature.args
            source = _Run(context, builder, kinds[3], panel)
            factor = _Run(context, builder, kinds[6], factors)
            sums = []
            for place, column in zip(
                _places(builder, at, apart, count),
                _places(builder, first, _INT_LANES, count),
                strict=True,
            ):
                sums.append(cgutils.alloca_once(builder, _VECTOR))
                scaled_run = builder.fmul(source.load(place), factor.load(column))
                builder.store(scaled_run, sums[-1])
            lefts = _Run(context, builder, kinds[8], left)
            rights = _Run(context, builder, kinds[10], right)
            with cgutils.for_range(builder, rank) as loop:
                by = lefts.spread(builder.add(row, loop.index))
                start = builder.add(builder.mul(loop.index, size), first)
                for kept, column in zip(
                    sums, _places(builder, start, _INT_LANES, count), strict=True
                ):
                    more = _multiply_add(builder, by, rights.load(column), builder.load(kept))
                    builder.store(more, kept)
            target = _Run(context, builder, kinds[0], matrix)
            begin = _Run(context, builder, kinds[12], base)
            for kept, place in zip(sums, _places(builder, to, _INT_LANES, count), strict=True):
                done = builder.load(kept)
                target.store(builder.fadd(begin.load(place), done) if onto else done, place)
            return context.get_dummy_value()

        given = (
            matrix, _INT, _INT, panel, _INT, _INT, factors, _INT, left, _INT, right, _INT, base
        )  # fmt: skip
        return types.void(*given), build

    return to_line


to_line, to_line_onto = _to_line(False, 1), _to_line(True, 1)
to_lines, to_lines_onto = _to_line(False, LINES), _to_line(True, LINES)

_INT_LANES = ir.Constant(ir.IntType(64), LANES)


def _multiply_add(builder: Any, a: _Value, b: _Value, c: _Value) -> _Value:
    """`a * b + c`, rounded once where the processor can."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    name = "llvm.fmuladd.v16f32"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [a, b, c])


def _places(builder: Any, first: _Value, stride: _Value, count: int) -> list[_Value]:
    places = [first]
    for _ in range(count - 1):
        places.append(builder.add(places[-1], stride))
    return places


def _transformed(builder: Any, runs: list[_Value]) -> list[_Value]:
    """The stages of a Hadamard transform, the widest first."""
    done, half = list(runs), len(runs) // 2
    while half:
        for i in range(len(done)):
            if not i & half:
                a, b = done[i], done[i + half]
                done[i], done[i + half] = builder.fadd(a, b), builder.fsub(a, b)
        half //= 2
    return done


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
