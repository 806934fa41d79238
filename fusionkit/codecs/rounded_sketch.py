"""What a sketch of so many bits is made of, and how noisy it is; rounded ones, of many bits.

Below `trellis.MOST` bits an entry a sketch is a trellis's, of a matrix that is mixed. Where there
are more, or where the matrix is so small that what fills it up costs more than a trellis saves, it
is rotated at random, so that its entries look Gaussian, and these are rounded to integers. Both are
scaled so that ⟨X̂, X⟩ = ‖X‖²: then the error is uncorrelated with X, in every small direction. The
energy of X̂ is larger than X's, which is the price.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusionkit.codecs import entropy, mixing, trellis
from fusionkit.codecs.decomposition import energy
from fusionkit.codecs.entropy import Model
from fusionkit.codecs.quantized_factors import Doubles, rate

MOST = 7.0
"""Bits per entry that can be used at all: integers of the widest model."""


class Sketched(NamedTuple):
    """A sketch, ready to be coded.

    Attributes:
        runs: its symbols, and their models.
        scale: σ.
        steps: of a trellis; 0 of integers.
        stream: uint8, the trellis's.
    """

    runs: list[tuple[Tensor, Model]]
    scale: float
    steps: int = 0
    stream: Tensor | None = None


def integers(values: Tensor, bits: float) -> Sketched | None:
    """The entries rounded to integers, in about as many bits; None: all would be zero.

    Args:
        values: float32, any shape.
        bits: for all of them.
    """
    deviation = (energy(values) / values.numel()) ** 0.5
    rounded = (values * (_deviation_of(bits / values.numel()) / deviation)).round_()
    product = float((values * rounded).sum(dtype=torch.float64))
    if not product > 0:
        return None
    scale = energy(values) / product
    symbols = rounded.reshape(-1).to(torch.int32).cpu()
    return Sketched([(symbols, entropy.best(symbols))], scale)


def noise(bits: Doubles) -> Doubles:
    """‖X̂ − X‖² / ‖X‖² of a sketch of so many bits per entry."""
    least = trellis.noise(np.array(trellis.MOST))
    return np.where(bits <= trellis.MOST, trellis.noise(bits), np.minimum(_rounded(bits), least))


def is_rounded(room: float, rows: int, columns: int, mixed: mixing.Levelled) -> bool:
    """Whether integers of so many bits have less noise than a trellis.

    They have of small matrices, as the zeros that fill these up take bits, and their part of the
    noise; and of matrices of which a few rows are nearly all, as they are rotated on both sides.

    Args:
        room: bits.
        rows: of the matrix.
        columns: likewise.
        mixed: the matrix, as a trellis would code it.
    """
    size, rate = rows * columns, min(room / len(mixed.numbers), trellis.MOST)
    filled = mixing.length(rows, columns) / size
    of_trellis = float(trellis.noise(np.array(rate))) * mixed.unevenness(rate) / filled
    return bool(_rounded(np.array(room / size)) < of_trellis)


def _rounded(bits: Doubles) -> Doubles:
    """The noise of integers."""
    rates, noises = _noises()
    return np.exp(np.interp(bits, rates, noises, left=np.inf))


def _deviation_of(bits: float) -> float:
    """Of a Gaussian whose rounded value takes so many bits."""
    grid = np.geomspace(0.1, 60, 400)
    return float(np.interp(bits, rate(grid), grid))


@cache
def _noises() -> tuple[Doubles, Doubles]:
    """Rates of integers, increasing, and the logarithms of their noises."""
    rates, noises = [], []
    x = torch.linspace(-8, 8, 40001, dtype=torch.float64)
    weights = torch.exp(-x.square() / 2)
    weights /= weights.sum()
    for deviation in np.geomspace(0.12, 60, 100):
        rounded = (x * deviation).round()
        square, product = (weights * rounded.square()).sum(), (weights * rounded * x).sum()
        rates.append(float(rate(np.array(deviation))))
        noises.append(math.log(float(square / product.square()) - 1))
    return np.array(rates), np.array(noises)
