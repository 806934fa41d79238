"""Integers as bytes at the length that a model of them allows; every machine reads them alike.

A range asymmetric numeral system (Duda 2013, 1311.2540) in whole numbers alone. The stream, enough
to write another decoder:

**State and words.** `state` is a whole number, 2^16 before anything is coded, below 2^48 ever
after. Steps append to it; when one would carry it to 2^48 or above, its lowest 16 bits are first
put away as a *word*. The symbols are coded from the last to the first, so that a decoder, which
undoes the steps, finds them from the first to the last. The bytes are `state - 2^16` at the end,
little-endian, then the words, the latest first, each two bytes little-endian. If there are words,
the state takes 6 bytes and is at least 2^32; else as few as it needs, none for 2^16.

**Undoing a step** that appended one of the frequencies `f[0], f[1], …`, whose sum is 2^16: with
`slot = state mod 2^16`, the index is the `i` with `c[i] <= slot < c[i + 1]`, where `c[i]` is the
sum of the frequencies before `i`; then `state = f[i] * (state div 2^16) + slot - c[i]`. **One that
appended k <= 16 bits:** they are `state mod 2^k`; then `state = state div 2^k`. After either, if
`state < 2^32` and a word is left, `state = state * 2^16 + word`. More than 16 bits are read 16 at
a time and the rest last, lower bits first.

**A symbol** is `rest * 2^low + extra`, `0 <= extra < 2^low`. `rest` has an index if it is at most
`last` (in magnitude, of a signed model): `rest + 1`, or `rest + last + 1` of a signed one. Read an
index first; if it isn't 0, then the `low` bits of `extra`. Index 0 is the escape. After it come 5
bits, `length`, and then as one number of `low + length` bits, one more if signed: `extra`, from
its lowest bit on, then `more`, `length` bits, then the sign, 1 for negative. The magnitude of
`rest` is `last + 2^length + more`. So any symbol may occur, at its price.

| model | signed | low | probability of a rest x |
|---|---|---|---|
| `Gaussian(scale)` | yes | 0 | of [x - ½, x + ½] under N(0, s²) |
| `Laplace(scale)` | yes | 0 | the same under the Laplace distribution of standard deviation s |
| `Gaps(count, total)` | no | see below | (1 - q) q^x, q = (1 - count / total)^(2^low) |
| `Bits()` | no | 1 | no index is coded: a symbol is one bit |

`s = 0.15 * (40 / 0.15)^(scale / 63)`. The low of `Gaps` is the number of binary digits of
`total div count`, less 4, but in [0, 27]; a count or total of 0 counts as 1.

**Frequencies.** A probability times 2^16 is rounded, half to even. `last` is the largest number up
to which none becomes 0, but no less than 1 (`Gaps`: 0). Rests other than 0 have what they became,
at least 1; the escape what lies beyond `last`, likewise; rest 0 what is left. Where that is less
than 1 (in `Gaps`), rest 0 has 1 and the escape gives way. `entropy_tables` makes these tables,
without a machine's floating-point numbers.

A stream is as long as `code_length` says but for a few millionths, and 4 bytes. No two streams
hold the same symbols, and `decode` refuses bytes that `encode` would not have made. That finds
what is cut short or too long, not every altered bit: other bits may be other symbols' stream.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionkit.codecs import entropy_kernels as kernels
from fusionkit.codecs import entropy_tables as tables
from fusionkit.codecs.entropy_tables import FRACTION, SCALES, Table

_WORDLESS = 6
"""Bytes of a state beside words, and the most that one without words can take."""


@dataclass(frozen=True)
class _Scaled:
    scale: int

    def __post_init__(self) -> None:
        if not 0 <= self.scale < SCALES:
            raise ValueError(f"expected a scale from 0 to {SCALES - 1}, got {self.scale}")


class Gaussian(_Scaled):
    """Integers about 0, normally distributed.

    Args:
        scale: from 0 to 63, of a standard deviation of 0.15 to 40, evenly in its logarithm.
    """


class Laplace(_Scaled):
    """Integers about 0, the longer tails of the Laplace distribution.

    Args:
        scale: from 0 to 63, of a standard deviation of 0.15 to 40, evenly in its logarithm.
    """


@dataclass(frozen=True)
class Gaps:
    """How many entries lie before each position, from the one before it on; not negative.

    Args:
        count: number of positions.
        total: number of entries that they point into.
    """

    count: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.total:
            raise ValueError(f"expected 0 <= count <= total, got {self.count} and {self.total}")


@dataclass(frozen=True)
class Bits:
    """0 and 1, equally likely."""


Model = Gaussian | Laplace | Gaps | Bits


def encode(runs: Sequence[tuple[Tensor, Model]]) -> Tensor:
    """Code runs of symbols, in order, into one stream.

    Args:
        runs: int32 `(n,)` on the CPU, any of them empty, each with its model. Models of signed
            symbols take any, the others none below 0, and `Bits` none above 1.

    Returns:
        uint8 `(bytes,)`: see the module's docstring.

    Raises:
        ValueError: a symbol that its model can't take, or a tensor of another dtype or shape.
    """
    for symbols, model in runs:
        _check(symbols, model)
    found = {model: _table(model) for _, model in runs}
    lengths = [(symbols.numel(), model) for symbols, model in runs]
    numbers, rows, cumulative, _ = _models(lengths, found)
    symbols = torch.cat([torch.empty(0, dtype=torch.int32), *(symbols for symbols, _ in runs)])
    state, words = kernels.encode(symbols.numpy(), numbers, rows, cumulative)
    known = int(state) - kernels.START
    size = _WORDLESS if len(words) else (known.bit_length() + 7) // 8
    coded = known.to_bytes(size, "little") + words.astype("<u2").tobytes()
    return torch.from_numpy(np.frombuffer(bytearray(coded), np.uint8))


def decode(stream: Tensor, runs: Sequence[tuple[int, Model]]) -> list[Tensor]:
    """Recover what `encode` coded.

    More symbols than the stream can hold are refused before memory is set aside. But cheap symbols
    may be hundreds of thousands in a byte: check numbers that come from a file as well.

    Args:
        stream: uint8 `(bytes,)` on the CPU.
        runs: how many symbols, and their model.

    Returns:
        int32 `(n,)` of each run; parts of one tensor.

    Raises:
        ValueError: the bytes are no such stream: cut short, too long, or altered.
    """
    if any(number < 0 for number, _ in runs):
        raise ValueError(f"expected numbers of symbols, got {[number for number, _ in runs]}")
    coded, count = stream.numpy().tobytes(), sum(number for number, _ in runs)
    state, words = _parts(coded)
    # A step makes the state larger by at least half of what its index ideally costs: `x` becomes
    # `x + (x div f) (2^16 - f)` or more, and `x div f` is at least half of `x / f`.
    found = {model: _table(model) for _, model in runs}
    least = sum(number * found[model].cheapest // 2 for number, model in runs)
    if least > len(coded) * 8 << FRACTION:
        raise ValueError(f"{len(coded)} bytes are too few for {count} coded symbols")
    numbers, rows, cumulative, first = _models(runs, found)
    symbols = np.empty(count, np.int32)
    if not kernels.decode(np.int64(state), words, numbers, rows, cumulative, first, symbols):
        raise ValueError(
            f"the {len(coded)} bytes are not {count} coded symbols of these models: "
            "they are cut short, too long, or altered"
        )
    ends = accumulate(number for number, _ in runs)
    whole = torch.from_numpy(symbols)
    return [whole[end - number : end] for end, (number, _) in zip(ends, runs, strict=True)]


def code_length(symbols: Tensor, model: Model) -> float:
    """Bits that `encode` will spend on symbols, but for a few millionths, and 4 bytes a stream.

    Args:
        symbols: int32 `(n,)` on the CPU.
        model: of the symbols.

    Returns:
        The same on every machine: a whole number of 2^-20 bits.

    Raises:
        ValueError: as `encode`.
    """
    _check(symbols, model)
    table, values = _table(model), symbols.numpy().astype(np.int64)
    rests = values >> table.low
    beyond = np.abs(rests) - table.last
    escaped = beyond > 0 if len(table.frequencies) else np.zeros(len(rests), bool)
    indices = np.where(escaped, 0, rests + table.offset if len(table.frequencies) else 0)
    spent = int(np.bincount(indices, minlength=len(table.costs)) @ table.costs)
    lengths = np.frexp(beyond[escaped].astype(np.float64))[1] - 1  # exact below 2^53
    more = table.escape * len(lengths) + int(lengths.sum())
    return (spent + (more << FRACTION)) / (1 << FRACTION)


def best(symbols: Tensor) -> Gaussian | Laplace:
    """The model whose code of the symbols is shortest, of both kinds and all scales.

    Args:
        symbols: int32 `(n,)` on the CPU.

    Returns:
        The same on every machine; of equals the first, `Gaussian`s before `Laplace`s.
    """
    models, lasts, costs = _scaled()
    widest = costs.shape[1]
    magnitudes = np.abs(symbols.numpy().astype(np.int64))
    counts = np.bincount(np.minimum(magnitudes, widest), minlength=widest + 1)
    spent = costs @ counts[:widest]
    if counts[widest]:
        far = np.sort(magnitudes[magnitudes >= widest])
        limits = lasts[:, None] + (1 << np.arange(32))  # from which on a length is 0, 1, …
        reached = len(far) - np.searchsorted(far, limits)
        lengths = reached[:, 1:].sum(1)
        escapes = np.array([_table(model).costs[0] for model in models])
        escape = _table(models[0]).escape
        spent += len(far) * escapes + (len(far) * escape + lengths << FRACTION)
    return models[int(spent.argmin())]


@lru_cache(maxsize=1024)
def _table(model: Model) -> Table:
    match model:
        case Gaussian(scale=scale):
            return tables.gaussian(scale)
        case Laplace(scale=scale):
            return tables.laplace(scale)
        case Gaps(count=count, total=total):
            return tables.geometric(count, total)
        case Bits():
            return tables.fair()


@cache
def _scaled() -> tuple[list[Gaussian | Laplace], NDArray[np.int64], NDArray[np.int64]]:
    """All models that have a scale, their `last`s, and what each magnitude costs under each."""
    models: list[Gaussian | Laplace] = [
        kind(scale) for kind in (Gaussian, Laplace) for scale in range(SCALES)
    ]
    lasts = np.array([_table(model).last for model in models])
    magnitudes = np.arange(lasts.max() + 1)
    costs = np.empty((len(models), len(magnitudes)), np.int64)
    for row, model in zip(costs, models, strict=True):
        table = _table(model)
        beyond = np.maximum(magnitudes - table.last, 1)
        lengths = np.frexp(beyond.astype(np.float64))[1] - 1
        row[:] = table.costs[0] + (table.escape + lengths << FRACTION)
        row[: table.last + 1] = table.costs[table.offset :]
    return models, lasts, costs


def _check(symbols: Tensor, model: Model) -> None:
    if symbols.dtype != torch.int32 or symbols.ndim != 1:
        shape = tuple(symbols.shape)
        raise ValueError(f"expected int32 symbols of one dimension, got {symbols.dtype} {shape}")
    if isinstance(model, _Scaled) or not symbols.numel():
        return
    least, most = (int(x) for x in symbols.aminmax())
    if least < 0 or (isinstance(model, Bits) and most > 1):
        raise ValueError(f"{model} can't code {least if least < 0 else most}")


def _models(
    runs: Iterable[tuple[int, Model]], found: Mapping[Model, Table]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.uint16]]:
    """What the kernels take: the runs, the models' rows, `cumulative` and `first`."""
    places = {model: place for place, model in enumerate(found)}
    numbers = np.array([(places[model], number) for number, model in runs], np.int64)
    starts = accumulate((len(table.cumulative) for table in found.values()), initial=0)
    rows = [
        (start, len(table.frequencies), table.last, table.low, table.signed)
        for start, table in zip(starts, found.values(), strict=False)
    ]
    first = [table.first for table in found.values()]
    return (
        numbers.reshape(-1, 2),
        np.array(rows, np.int64).reshape(-1, 5),
        np.concatenate([*(table.cumulative for table in found.values()), np.empty(0, np.int64)]),
        np.concatenate([*first, np.empty(0, np.uint16)]).reshape(-1, 1 << tables.BUCKETS),
    )


def _parts(coded: bytes) -> tuple[int, NDArray[np.uint16]]:
    """The state and the words."""
    known, rest = coded[:_WORDLESS], coded[_WORDLESS:]
    state = int.from_bytes(known, "little") + kernels.START
    least = 1 << 32 if rest else kernels.START
    if len(rest) % 2 or not least <= state < 1 << 48 or (not rest and known[-1:] == b"\0"):
        raise ValueError(
            f"the {len(coded)} bytes are not coded symbols: they are cut short or altered"
        )
    return state, np.frombuffer(rest, "<u2").astype(np.uint16)
