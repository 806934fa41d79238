"""The strong singular directions of a matrix as small integers: how many, how coarse, how scaled.

A direction is kept where the error that it takes away is worth its bits: θ is the error, per
entry, at which a bit is bought. Its factors u √σ and v √σ are rounded to a grid whose step grows
with σ (`EXPONENT`): strong directions may be coarser than the least error asks for, as their
rounding is incoherent. The products of the rounded factors are then fitted to the matrix, a gain
each, so that what rounding takes from their size is given back.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs.decomposition import Spectral
from fusionkit.codecs.whitening import ALIKE, Metric

Doubles = NDArray[np.float64]

HEADER = 4
"""Bytes that a direction takes beside its integers: two models, a step, a gain."""

_DEADZONE = 1.15
"""How much more error rounding leaves than a step's square over 12, where rates are low."""
_STEPS = 16
"""Steps per octave, of the grid that a direction's step is on."""
_WIDEST = 32
"""The largest deviation of a direction's integers: wider ones no model has."""
_GAINS = 64
"""The same of gains, which lie in [½, 8)."""
_GROWS_TO = 3.0
"""No matrix is scaled up by more."""


class QuantizedFactors(NamedTuple):
    """A matrix of rank r, as it is stored.

    Attributes:
        left: int32 `(rows, r)`.
        right: int32 `(columns, r)`.
        step: the finest direction's.
        steps: uint8 `(r,)`: each direction's step is 2^(code / 16) of it.
        gains: uint8 `(r,)`: each direction is multiplied by 2^(code / 64 − 1).
    """

    left: Tensor
    right: Tensor
    step: float
    steps: Tensor
    gains: Tensor

    def to(self, device: torch.device) -> "QuantizedFactors":
        """The same elsewhere."""
        moved = (tensor.to(device) for tensor in (self.left, self.right, self.steps, self.gains))
        left, right, steps, gains = moved
        return QuantizedFactors(left, right, self.step, steps, gains)

    def scaled(self, factor: float) -> "QuantizedFactors":
        """Factors of the matrix times a factor above 0."""
        return self._replace(step=float(np.float32(self.step * math.sqrt(factor))))

    def product(self, gain: Tensor | float = 1.0) -> LowRank:
        """The factors in float32, on the integers' device; differentiable in the gain."""
        steps = torch.exp2(self.steps.to(torch.float32) / _STEPS) * self.step
        gains = torch.exp2(self.gains.to(torch.float32) / _GAINS - 1)
        left = self.left.to(torch.float32) * steps
        right = self.right.to(torch.float32) * steps
        return LowRank(left * (gains * gain), right)


def quantize(
    matrix: Tensor,
    leading: Spectral,
    theta: float,
    exponent: float,
    power: float,
    metric: Metric = ALIKE,
) -> QuantizedFactors:
    """Round the leading singular directions of a matrix, and fit their gains.

    Rounding to the nearest integer of value / (1 + 1 / (12 s²)), s the column's deviation in
    steps, is rounding with the rate in mind, at the price of a bit at θ under a Gaussian.

    Args:
        matrix: float32 `(rows, columns)`.
        leading: those of its singular directions, as the metric sees it, that are kept, at least
            one.
        theta: the error per entry at which bits are bought.
        exponent: e; steps grow with σ^(e − ½).
        power: p; all is multiplied by (‖δ‖² / ‖δ̂‖²)^p, for what was left out.
        metric: how errors are felt.
    """
    s = leading.s.to(torch.float64)
    wanted = math.sqrt(12 * theta / float(s[-1])) * (s / s[-1]) ** (exponent - 0.5)
    columns = metric.back(leading.u, leading.v)
    squares = [side.to(torch.float64).square().mean(0) for side in columns]
    # Nor so coarse that a side is zero, as one would be of which all entries are alike.
    largest = torch.minimum(*(side.abs().amax(0) for side in columns)).to(torch.float64)
    wanted = torch.minimum(wanted, s.sqrt() * largest)
    wanted = torch.maximum(wanted, (s * torch.maximum(*squares)).sqrt() / _WIDEST)
    step = float(np.float32(float(wanted.min())))
    steps = (torch.log2(wanted / step) * _STEPS).round().clamp(0, 255).to(torch.uint8)
    sizes = step * torch.exp2(steps.to(torch.float64) / _STEPS)
    root = (s.sqrt() / sizes).to(torch.float32)
    left, right = (_rounded(column * root) for column in columns)
    # A code of 64 is a gain of 1.
    plain = QuantizedFactors(left, right, step, steps, torch.full_like(steps, _GAINS))
    gains = _fitted(metric.seen(matrix), metric.product(plain.product()))
    if power:
        a, b = plain.product()
        dense = (a * gains.to(a)) @ b.mT
        ratio = float(matrix.square().sum() / dense.square().sum().clamp(min=1e-30))
        gains = gains * min(ratio**power, _GROWS_TO)
    codes = ((torch.log2(gains.clamp(min=1e-9)) + 1) * _GAINS).round().clamp(0, 255)
    return plain._replace(gains=codes.to(torch.uint8))


def finest(weakest: float, shape: torch.Size) -> float:
    """θ below which the integers of a matrix's weakest direction get no wider."""
    return weakest**2 / (12 * min(shape) * _WIDEST**2)


def least_kept(rows: Doubles, columns: Doubles) -> Doubles:
    """σ² / θ above which a singular direction is worth its bits, by its matrix's sides.

    θ is the error per entry at which bits are bought.
    """
    rows, columns = np.maximum(rows, 1), np.maximum(columns, 1)
    both = rows + columns
    low, high = both, 64 * both + 1000

    def gains(x: Doubles) -> Doubles:
        nats = rows * np.log(x / rows).clip(0) + columns * np.log(x / columns).clip(0)
        gained: Doubles = x - both - nats - 2 * math.log(2) * 8 * HEADER
        return gained

    for _ in range(60):
        middle = (low + high) / 2
        kept = gains(middle) > 0
        low, high = np.where(kept, low, middle), np.where(kept, middle, high)
    return high * _DEADZONE


def cost(
    squares: Doubles,
    weakest: Doubles,
    rows: Doubles,
    columns: Doubles,
    theta: float,
    exponent: float,
) -> tuple[Doubles, Doubles]:
    """About how many bits kept directions take, and what error energy they leave.

    Args:
        squares: σ², float64, of any number of matrices.
        weakest: of the weakest one that its matrix keeps.
        rows: of the matrix that each is of.
        columns: likewise.
        theta: the error per entry at which bits are bought.
        exponent: e; see `quantize`.
    """
    s, least = np.sqrt(squares), np.sqrt(weakest)
    step = np.sqrt(12 * theta / least) * (s / least) ** (exponent - 0.5)
    step = np.maximum(step, np.sqrt(s / np.minimum(rows, columns)) / _WIDEST)
    bits = rows * rate(np.sqrt(s / rows) / step) + columns * rate(np.sqrt(s / columns) / step)
    error = _DEADZONE * step**2 / 12 * s * (rows + columns)
    return bits + 8 * HEADER, np.minimum(error, squares)


def rate(deviation: Doubles) -> Doubles:
    """Bits of an integer that is a Gaussian of this deviation, rounded: its entropy."""
    deviations, bits = _rates()
    wide = 0.5 * np.log2(2 * math.pi * math.e * (np.square(deviation) + 1 / 12))
    return np.where(deviation > deviations[-1], wide, np.interp(deviation, deviations, bits))


@cache
def _rates() -> tuple[Doubles, Doubles]:
    deviations = torch.logspace(-1.5, 1, 120, dtype=torch.float64)
    edges = torch.arange(-80, 82, dtype=torch.float64) - 0.5
    shares = torch.special.ndtr(edges[:, None] / deviations).diff(dim=0)
    bits = torch.special.entr(shares).sum(0) / math.log(2)
    return deviations.numpy(), bits.numpy()


def _rounded(values: Tensor) -> Tensor:
    squares = values.square().mean(0)
    shrunk = values / (1 + 1 / (12 * squares.clamp(min=1e-12)))
    return shrunk.round_().to(torch.int32)


def _fitted(matrix: Tensor, factors: LowRank) -> Tensor:
    """Gains of least error: float64 `(r,)`."""
    left, right = factors
    gram = ((left.mT @ left) * (right.mT @ right)).to(torch.float64)
    wanted = ((left.mT @ matrix) * right.mT).sum(1).to(torch.float64)
    ridge = 1e-4 * gram.diagonal() + 1e-12 * gram.diagonal().max().clamp(min=1e-30)
    gains: Tensor = torch.linalg.solve(gram + ridge.diag(), wanted)
    return gains
