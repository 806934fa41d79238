"""A matrix as a sequence that a `trellis` codes well: its columns mixed, its rows in groups.

The code takes no direction for another, but what a window of it spans should be of one size. So
what a column holds is spread over others, and numbers of 16 rows take turns. A matrix of m × n,
filled up with zeros to multiples of 16 (what comes back there is dropped), is mixed by

    Y = X D (W(s₁, s₂)ᵀ ⊗ H₁₆)

where `D` is as `rotation` has it of the columns' side, and `W`, its signs and `order` likewise,
but of N = ⌈n / 16⌉: runs of 16 columns are mixed with each other, and each in itself. The sequence
is 16 rows after the other; of these, it has for `i` from 0 to N − 1 and `r` from 0 to 15 the 16
numbers of row `r` in run `order[(i + r) mod N]`.

Rows are in groups, each of as few times 16 as hold 4096 numbers of the sequence. A group's level
`l`, a whole number from −64 to 256, says its size: its numbers are what the trellis gives times
2^(l / 8). Level 0 is the median of the sizes, or 2^-32 of the largest if that is more. At −64 there
is nothing: no bits are spent on the group, and it comes back as zero. So noise is where the matrix
is, and in rows that nothing was tuned in there is none.

A matrix of fewer than 256 columns and more rows is transposed first.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs import trellis
from fusionkit.codecs.decomposition import energy
from fusionkit.codecs.rotation import Added, flat_of, hadamard, target_of
from fusionkit.codecs.rotation_sides import Side, flips, mixing_of
from fusionkit.codecs.threads import over, panels

RUN = 16
"""Columns that stay together, and rows that take turns."""
NONE = -64
"""The level of a group that is zero, or as good as that."""
_GROUP = 4096
"""Numbers of a group, at least."""
_LEVELS = 8
"""An octave."""
_HIGHEST = 256
"""Level."""
_NARROW = 256
_AT_ONCE = 1 << 21
"""Numbers that are looked up at once, where PyTorch does it: so memory is some 200 MB."""


class Coded(NamedTuple):
    """A matrix's sequence, as it is stored.

    Attributes:
        levels: int32 `(groups,)`.
        steps: of the trellis.
        stream: uint8, the trellis's bits.
        numbers: that it codes.
        starts: int64 `(groups,)`, where each group's start; −1 of one that is zero.
        gains: float32 `(groups,)`, by their levels.
    """

    levels: Tensor
    steps: int
    stream: Tensor
    numbers: int
    starts: NDArray[np.int64]
    gains: NDArray[np.float32]


class Levelled(NamedTuple):
    """A matrix's sequence, ready to be coded.

    Attributes:
        levels: int32 `(groups,)`.
        numbers: float32, of the groups that are not zero, divided by their sizes.
        groups: of these, each counting by its size's square, over that of level 0.
        energy: of all numbers, so counted.
        size: of level 0.
    """

    levels: Tensor
    numbers: Tensor
    groups: trellis.Groups
    energy: float
    size: float

    def unevenness(self, rate: float) -> float:
        """How much noisier a trellis is, as what its windows span is not of one size; 1 or more.

        A window says as much of a quiet part as of a loud one: of parts of energies e, what comes
        back has their roots, and is scaled to be unbiased on the whole.

        Args:
            rate: bits a number.
        """
        span = RUN * _runs(math.ceil(trellis.WINDOW / rate))
        whole = len(self.numbers) // span * span
        if not whole:
            return 1.0
        sizes = torch.linalg.vector_norm(self.numbers[:whole].view(-1, span), dim=1).double()
        return float(sizes.square().mean() / sizes.mean() ** 2)


def is_turned(rows: int, columns: int) -> bool:
    """Whether a matrix is transposed first."""
    return columns < _NARROW and rows > columns


def groups_of(rows: int, columns: int) -> int:
    """How many groups a matrix's rows are in."""
    if is_turned(rows, columns):
        rows, columns = columns, rows
    return -(-_runs(rows) // _panels(columns))


def length(rows: int, columns: int) -> int:
    """Numbers of a matrix's sequence."""
    return RUN * RUN * _runs(rows) * _runs(columns)


def levelled(matrix: Tensor, seed: int, place: int) -> Levelled | None:
    """Mix a matrix, and level its groups; None: it is zero.

    Args:
        matrix: float32 `(m, n)`.
        seed: see `rotation.rotate`.
        place: likewise.
    """
    if is_turned(*matrix.shape):
        matrix = matrix.mT
    sequence = _mixed(matrix, seed, place)
    groups = torch.split(sequence, _group(matrix.shape[1]))
    energies = np.array([energy(group) for group in groups])
    counts = np.array([len(group) for group in groups])
    sizes = np.sqrt(energies / counts)
    if not sizes.any():
        return None
    least = float(sizes.max()) * 2.0 ** (-_HIGHEST / _LEVELS)
    size = max(float(np.median(sizes[sizes > 0])), least)
    with np.errstate(divide="ignore"):
        found = (np.log2(sizes / size) * _LEVELS).clip(NONE, _HIGHEST).round()
    levels = torch.from_numpy(found.astype(np.int32))
    gains, alive = _gains(levels).numpy(), found > NONE
    for group, gain in zip(groups, gains.tolist(), strict=True):
        group.div_(size * gain)
    weights = gains[alive].astype(np.float64) ** 2
    whole = float(energies[alive].sum()) / size**2
    if not alive.all():
        sequence = torch.cat([one for one, is_kept in zip(groups, alive, strict=True) if is_kept])
    return Levelled(levels, sequence, trellis.Groups(counts[alive].cumsum(), weights), whole, size)


def read(levels: Tensor, steps: int, stream: Tensor, rows: int, columns: int) -> Coded:
    """What is stored of a matrix's sequence.

    Args:
        levels: int32 `(groups_of(rows, columns),)`.
        steps: of the trellis.
        stream: uint8, its bits.
        rows: of the matrix.
        columns: likewise.

    Raises:
        ValueError: it can't be of such a matrix.
    """
    if is_turned(rows, columns):
        rows, columns = columns, rows
    known = levels.numpy()
    if known.min() < NONE or known.max() > _HIGHEST:
        raise ValueError("a level of a matrix's rows is out of range")
    sizes = np.full(len(known), _group(columns), np.int64)
    sizes[-1] = length(rows, columns) - int(sizes[:-1].sum())
    sizes *= known > NONE
    ends = sizes.cumsum()
    numbers = int(ends[-1])
    trellis.check(stream, steps, numbers)
    starts = np.where(sizes > 0, ends - sizes, -1)
    return Coded(levels, steps, stream, numbers, starts, _gains(levels).numpy())


def rebuild(
    coded: Coded,
    shape: tuple[int, int] | torch.Size,
    seed: int,
    scale: float,
    *,
    place: int = 0,
    product: LowRank | None = None,
    base: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The matrix that was coded, times a scale, and what is added to it.

    On the CPU as many threads work as `torch.get_num_threads()` says; the result doesn't depend on
    how many.

    Args:
        coded: of a matrix of this shape.
        shape: `(m, n)`.
        seed: see `rotation.rotate`.
        scale: of the trellis's values.
        place: see `rotation.rotate`.
        product: see `rotation.rotate`.
        base: see `rotation.rotate`.
        out: see `rotation.rotate`.

    Returns:
        float32 `(m, n)`, contiguous: `out`, or a new tensor, on the stream's device.
    """
    rows, columns = shape
    target = target_of(torch.Size(shape), coded.stream.device, out)
    added = Added.of(target, product, base)
    if is_turned(rows, columns):
        turned = rebuild(coded, (columns, rows), seed, scale, place=place)
        return added.write(target, turned.mT)
    if target.device.type != "cpu":
        return added.write(target, _looked_up(coded, rows, columns, seed, place).mul_(scale))
    from fusionkit.codecs import mixing_kernels as kernels

    table = trellis.table(coded.numbers, coded.steps)
    room = RUN**2 * _runs(columns) + 2 * RUN * _runs(-(-coded.numbers // coded.steps))
    side, signs = mixing_of(seed, _runs(columns), True).steps(), _signs(seed, columns, place)
    given = coded.stream.numpy(), coded.steps, coded.numbers, table
    groups = coded.starts, coded.gains * np.float32(scale), _panels(columns)
    flat, addend = flat_of(target), added.flat(target)

    def run(begin: int, end: int) -> None:
        work = panels(room)
        kernels.rebuild(given, groups, flat, work, side, signs, addend, begin, end, columns)

    over(rows, RUN, target.numel(), run)
    return target


def _runs(size: int) -> int:
    return -(-size // RUN)


def _panels(columns: int) -> int:
    """Times 16 rows of a group."""
    return math.ceil(_GROUP / (RUN**2 * _runs(columns)))


def _group(columns: int) -> int:
    """Numbers of a group, but for the last."""
    return _panels(columns) * RUN**2 * _runs(columns)


def _gains(levels: Tensor) -> Tensor:
    return torch.exp2(levels.to(torch.float32) / _LEVELS)


@lru_cache(maxsize=256)
def _signs(seed: int, columns: int, place: int) -> NDArray[np.float32]:
    """What each column is multiplied by at the end: float32, a multiple of 16 of them."""
    runs = _runs(columns)
    own: NDArray[np.float32] = mixing_of(seed, runs, True).factors[4].repeat(RUN)
    own[:columns] *= flips(seed, 1, columns, place)
    return own


def _mixed(matrix: Tensor, seed: int, place: int) -> Tensor:
    """A matrix's sequence."""
    if matrix.device.type == "cpu":
        from fusionkit.codecs import mixing_kernels as kernels

        (rows, columns), across = matrix.shape, _runs(matrix.shape[1])
        side, signs = mixing_of(seed, across, False), _signs(seed, columns, place)
        sequence, flat = matrix.new_empty(length(rows, columns)), flat_of(matrix)
        whole = sequence.numpy()

        def run(begin: int, end: int) -> None:
            work = panels(RUN**2 * across)
            kernels.mix(flat, whole, work, side.steps(), signs, begin, end, columns)

        over(rows, RUN, rows * columns, run)
        return sequence
    return _mixed_by_torch(matrix, seed, place)


def _mixed_by_torch(matrix: Tensor, seed: int, place: int) -> Tensor:
    (rows, columns), device = matrix.shape, matrix.device
    down, across = _runs(rows), _runs(columns)
    side, signs = mixing_of(seed, across, False), _signs(seed, columns, place)
    filled = matrix.new_zeros(RUN * down, RUN * across)
    filled[:rows, :columns] = matrix
    filled *= torch.from_numpy(signs).to(device)
    factors, (order, turns) = torch.from_numpy(side.factors).to(device), _order(side.order, device)
    now = _windowed(filled.view(RUN * down, across, RUN), side, factors[1])
    now = hadamard((now * factors[2][:, None]).view(-1, RUN, 1)).view(down, RUN, across, RUN)
    return now[:, turns, order].reshape(-1)


def _windowed(rows: Tensor, side: Side, factors: Tensor) -> Tensor:
    """Runs mixed, in place: a transform of the first window; if there is another, times factors."""
    for number, start in enumerate(dict.fromkeys(side.windows.tolist())):
        part = rows[:, start : start + side.power]
        if number:
            part.mul_(factors[start : start + side.power, None])
        part.copy_(hadamard(part))
    return rows


def _order(back: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each run of a panel's sequence, which of the columns' it is, and the row."""
    order = torch.from_numpy(back).argsort()
    i, r = torch.arange(len(order))[:, None], torch.arange(RUN)
    return order[(i + r) % len(order)].to(device), r.expand(len(order), RUN).to(device)


def _looked_up(coded: Coded, rows: int, columns: int, seed: int, place: int) -> Tensor:
    """The matrix, in PyTorch."""
    device, down, across = coded.stream.device, _runs(rows), _runs(columns)
    side, signs = mixing_of(seed, across, True), torch.from_numpy(_signs(seed, columns, place))
    factors, (order, turns) = torch.from_numpy(side.factors).to(device), _order(side.order, device)
    matrix = torch.zeros(RUN * down, RUN * across, device=device)
    height, size = _panels(columns), RUN * RUN * across
    known, some = (coded.starts >= 0).repeat(height)[:down].nonzero()[0], max(_AT_ONCE // size, 1)
    for begin in range(0, len(known), some):
        part = known[begin : begin + some]
        first, last = begin * size, (begin + len(part)) * size
        values = trellis.look_up(coded.stream, coded.steps, coded.numbers, first, last)
        gains = torch.from_numpy(coded.gains[part // height]).to(device)
        values = values.view(-1, across, RUN, RUN) * gains[:, None, None, None]
        at = torch.from_numpy(part).to(device)[:, None, None]
        matrix.view(down, RUN, across, RUN)[at, turns, order] = values
    now = hadamard(matrix.view(-1, RUN, 1)).view(RUN * down, across, RUN)
    now = _windowed(now * factors[2][:, None], side, factors[3])
    return (now.view(RUN * down, -1) * signs.to(device))[:rows, :columns]
