"""What `Sketch` does to one tensor: measure it, and make codes of it that keep to their bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusionkit.codecs import entropy, mixing, trellis
from fusionkit.codecs.allocation import Allowance
from fusionkit.codecs.decomposition import (
    Spectral,
    energy,
    matrix_of,
    squared_singular_values,
    svd_gram,
    svd_product,
    svd_randomized,
)
from fusionkit.codecs.quantized_factors import (
    HEADER,
    Doubles,
    QuantizedFactors,
    finest,
    quantize,
)
from fusionkit.codecs.rotation import rotate
from fusionkit.codecs.rounded_sketch import MOST, Sketched, integers, is_rounded
from fusionkit.codecs.sketch_codes import (
    FIXED_BYTES,
    INTEGERS,
    NOTHING,
    PLAIN,
    TRELLIS,
    runs_of,
    write,
)
from fusionkit.codecs.whitening import ALIKE, Metric, Metrics
from fusionkit.task_vectors.vectors import TaskVectors

_GRAM_LIMIT = 2048
"""Rows or columns up to which all singular values are found."""
_LEADING = 64
"""How many of a larger matrix are; what is beyond them is sketched."""
_ITERATIONS = 2
"""By which those are found: σ² of what stands out is exact, of flat noise a sixth too small."""
_TRIES = 8
_FILLED = 128
"""A sketch takes all its bytes but for one in so many."""


@dataclass(frozen=True)
class How:
    """What is made of a matrix.

    Attributes:
        exponent: e, by which steps grow; see `quantized_factors.quantize`.
        power: p, by which all is scaled up for what was left out.
        sketch: whether what the directions leave is sketched.
    """

    exponent: float
    power: float
    sketch: bool

    @classmethod
    def sketched(cls) -> "How":
        """Directions and sketch: nothing is left out."""
        return cls(0.8, 0.0, True)

    @classmethod
    def directions_alone(cls) -> "How":
        """One step for all directions of a matrix, and a gain for what they leave out."""
        return cls(0.5, 0.27, False)


class Measured(NamedTuple):
    """What a pass sees of one tensor: ‖θ₀‖², and per task ‖δ‖² and σ² of the directions."""

    base: float
    energies: Sequence[float]
    squares: Sequence[Doubles]


def sides(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of the matrix that a tensor counts as; 1 and its size of a vector."""
    rows, columns = matrix_of(shape)
    return (rows, columns) if min(rows, columns) > 1 else (1, shape.numel())


def measure(vectors: TaskVectors, metrics: Metrics = lambda task, name: ALIKE) -> Measured:
    """Energies and squared singular values of one tensor, of each task, as they are felt."""
    rows, columns = sides(vectors.shape)
    base = 0.0
    if rows > 1:
        unit, normal = _normal(vectors.base.to(vectors.device, torch.float32))
        base = energy(normal) * unit**2
        del normal
    energies, squares = [], []
    for task in range(len(vectors)):
        unit, normal = _normal(vectors[task].view(rows, columns))
        metric = metrics(task, vectors.name)
        seen = metric.seen(normal)
        energies.append(energy(seen) * unit**2)
        if rows == 1 or not unit:
            squares.append(np.empty(0))
        else:
            squares.append(_squares(vectors, task, unit, seen, metric).cpu().numpy() * unit**2)
    return Measured(base, energies, squares)


def encode_tensor(
    vectors: TaskVectors,
    task: int,
    allowed: Allowance,
    place: int,
    seed: int,
    how: How,
    metric: Metric,
) -> Tensor | None:
    """One task's codes of one tensor.

    Args:
        vectors: the tensor's.
        task: whose.
        allowed: bytes that the codes may take, directions that are kept, their price, and η.
        place: of the tensor, among its task's gains.
        seed: of the rotations.
        how: what is made of it.
        metric: how errors in it are felt.

    Returns:
        uint8 `(n,)`, n at most what is allowed; None if so few bytes hold nothing of it.
    """
    rows, columns = sides(vectors.shape)
    unit, matrix = _normal(vectors[task].view(rows, columns))
    if not unit:
        return None
    if rows == 1:
        return _rounded(
            matrix, unit, None, place, PLAIN, allowed.nbytes, _room(None, allowed.nbytes)
        )
    theta = allowed.theta / unit / unit
    leading = None
    if allowed.rank:
        leading = _leading(vectors, task, unit, metric.seen(matrix), metric, allowed.rank)
    if not how.sketch:
        assert leading is not None
        return _directions(matrix, unit, leading, theta, place, how, allowed.nbytes, metric)
    for rank in range(allowed.rank, -1, -1):
        factors, rest = None, matrix
        if rank and leading is not None:
            factors = quantize(matrix, leading.first(rank), theta, how.exponent, how.power, metric)
            left, right = factors.product()
            rest = torch.addmm(matrix, left, right.mT, alpha=-1)
            factors = factors.scaled(unit)
        size = unit * allowed.shrunk
        room, mixed = _room(factors, allowed.nbytes), None
        if 0 < room <= trellis.MOST * rest.numel():
            mixed = mixing.levelled(rest, seed, place)
        if mixed is not None and not is_rounded(room, rows, columns, mixed):
            codes = _by_trellis(mixed, size, factors, place, allowed.nbytes)
        else:
            del mixed
            turned = rotate(rest, seed, place=place, out=rest if rest is not matrix else None)
            codes = _rounded(turned, size, factors, place, INTEGERS, allowed.nbytes, room)
        if codes is not None:
            return codes
        if factors is not None:
            codes = write(NOTHING, place, factors, None)
            if len(codes) <= allowed.nbytes:
                return codes
    return None


def _directions(
    matrix: Tensor,
    unit: float,
    leading: Spectral,
    theta: float,
    place: int,
    how: How,
    limit: int,
    metric: Metric,
) -> Tensor | None:
    """Codes of the directions alone, rounded as finely as fits; None: no step is coarse enough."""
    best, low, high = None, 0.0, math.inf
    theta = max(theta, finest(float(leading.s[-1]), matrix.shape))
    for tries in range(_TRIES):
        factors = quantize(matrix, leading, theta, how.exponent, how.power, metric).scaled(unit)
        codes = write(NOTHING, place, factors, None)
        over = len(codes) - limit
        if over > 0:
            low = theta
        else:
            best, high = codes, theta
            if over >= -max(limit // _FILLED, 1):
                break
        # Of a factor of 4 in θ each entry takes a bit; where it doesn't, further away.
        bits = 8 * (over + 1) / (sum(matrix.shape) * len(leading.s))
        theta *= 4.0 ** (2**tries * math.copysign(max(abs(bits), 0.01), over))
        if not low < theta < high:
            theta = math.sqrt(low * high)
    return best


def _room(factors: QuantizedFactors | None, limit: int) -> float:
    """Bits that are left for a sketch."""
    room = 8.0 * (limit - FIXED_BYTES)
    if factors is not None:
        room -= 8 * HEADER * len(factors.steps)
        room -= sum(entropy.code_length(symbols, model) for symbols, model in runs_of(factors))
    return room


def _by_trellis(
    found: mixing.Levelled,
    unit: float,
    factors: QuantizedFactors | None,
    place: int,
    limit: int,
) -> Tensor | None:
    """Codes with a trellis in what is left of the bytes; None: too few are."""
    numbers = found.numbers.cpu()
    runs: list[tuple[Tensor, entropy.Model]] = [(found.levels, entropy.best(found.levels))]
    # Without its bits, as the length of the others is known once they are written.
    fixed = len(write(TRELLIS, place, factors, Sketched(runs, 0.0)))
    steps = trellis.steps_in(8 * (limit - fixed), len(numbers))
    if not steps:
        return None
    stream, product = trellis.search(numbers, steps, found.groups)
    if not product > 0:
        return None
    scale = found.energy / product * found.size * unit
    return write(TRELLIS, place, factors, Sketched(runs, scale, steps, stream))


def _rounded(
    values: Tensor,
    unit: float,
    factors: QuantizedFactors | None,
    place: int,
    form: int,
    limit: int,
    room: float,
) -> Tensor | None:
    """Codes with as fine integers as fit; None: with none at all they don't."""
    flat = values.reshape(-1)
    if room <= 0 or not flat.any():
        return None
    best, most = None, MOST * len(flat)
    low, high, bits = 0.0, math.inf, min(room, most)
    for _ in range(_TRIES):
        sketched = integers(flat, bits)
        over, used = -limit, bits / 2
        if sketched is not None:
            codes = write(form, place, factors, sketched._replace(scale=sketched.scale * unit))
            over = len(codes) - limit
            used = max(room + 8 * over, 1.0)
        if over > 0:
            high = bits
        else:
            low = bits
            best = codes if sketched is not None else best
            if bits == most or over >= -max(limit // _FILLED, 1):
                break
        bits = min(bits * (room - 8) / used, most)
        if not low < bits < high:
            bits = (low + high) / 2 if high < math.inf else min(2 * low, most)
    return best


def _normal(delta: Tensor) -> tuple[float, Tensor]:
    """The largest magnitude, and what is left when all is divided by it."""
    low, high = (float(x) for x in delta.aminmax()) if delta.numel() else (0.0, 0.0)
    unit = max(-low, high)
    return unit, delta / unit if unit else delta


def _squares(vectors: TaskVectors, task: int, unit: float, seen: Tensor, metric: Metric) -> Tensor:
    product = vectors.low_rank(task)
    if product is not None:
        return svd_product(metric.product(product)).s.to(torch.float64).div_(unit).square_()
    if min(seen.shape) <= _GRAM_LIMIT:
        return squared_singular_values(seen)
    return svd_randomized(seen, _LEADING, _ITERATIONS).s.to(torch.float64).square_()


def _leading(
    vectors: TaskVectors, task: int, unit: float, seen: Tensor, metric: Metric, rank: int
) -> Spectral:
    """The leading directions, as seen, of a matrix that was divided by `unit`."""
    product = vectors.low_rank(task)
    if product is not None:
        found = svd_product(metric.product(product))
        return found._replace(s=found.s / unit).first(rank)
    small = min(seen.shape) <= _GRAM_LIMIT
    return (svd_gram(seen, rank) if small else svd_randomized(seen, rank)).first(rank)
