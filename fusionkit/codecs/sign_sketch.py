"""An unbiased sketch of a matrix in few bits: rotated, its largest entries as signs.

Rotated at random, a matrix without dominant directions has Gaussian entries X. Of these the
largest in magnitude are kept, as signs, times σ = ‖X‖² / Σ_kept |X|: then ⟨X̂, X⟩ = ‖X‖², and by
Bussgang's theorem the error is uncorrelated with X in every small direction. Stronger directions
than that make the largest entries larger still, and would come back up to half too large, so that
σ is the one at which ⟨X̂ Xᵀ, X Xᵀ⟩ = ‖X Xᵀ‖²: each direction counts by its energy. The energy of X̂
is larger than X's, which is the price. The share ρ that is kept costs H(ρ) + ρ bits per entry.
Where there are more, the entries are rounded to integers instead.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusionkit.codecs import entropy
from fusionkit.codecs.decomposition import energy
from fusionkit.codecs.entropy import Model
from fusionkit.codecs.quantized_factors import Doubles, rate
from fusionkit.task_vectors.topk import top_k

SIGNS_TO = 0.9
"""Bits per entry up to which signs are kept; a fifth of the entries."""
MOST = 7.0
"""Bits per entry that can be used at all: integers of the widest model."""
_ROWS = 256
"""Of a matrix, by which the size of its sketch is found."""
_LEAST_SIZE, _MOST_SIZE = 0.5, 1.1
"""Between which that lies, over σ; of very few signs it is not known well."""


class Sketched(NamedTuple):
    """A sketch, ready to be coded.

    Attributes:
        runs: its symbols, and their models.
        kept: how many signs are kept; 0 of integers.
        scale: σ.
    """

    runs: list[tuple[Tensor, Model]]
    kept: int
    scale: float


def signs(values: Tensor, bits: float) -> Sketched | None:
    """The largest entries as signs, in about as many bits; None: there are too few for one.

    Args:
        values: float32 `(n,)`, rotated.
        bits: for all of them.
    """
    found = _largest(values, bits)
    if found is None:
        return None
    positions, kept = found
    size = float(kept.abs().sum(dtype=torch.float64))
    scale = energy(values) / size
    gaps = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
    model = entropy.Gaps(len(positions), values.numel())
    ones = (kept > 0).to(torch.int32)
    runs: list[tuple[Tensor, Model]] = [
        (gaps.to(torch.int32).cpu(), model),
        (ones.cpu(), entropy.Bits()),
    ]
    return Sketched(runs, len(positions), scale)


def relative_size(values: Tensor, bits: float) -> float:
    """The σ at which ⟨X̂ Xᵀ, X Xᵀ⟩ = ‖X Xᵀ‖², over that of `signs`.

    Rotated, all rows are alike: some of them are enough.

    Args:
        values: float32 `(rows, columns)`, rotated.
        bits: for all of them.
    """
    found = _largest(values.reshape(-1), bits)
    if found is None or min(values.shape) < 2:
        return 1.0
    positions, kept = found
    size = float(kept.abs().sum(dtype=torch.float64))
    plain = energy(values) / size
    sketch = torch.zeros(values.numel(), device=values.device)
    sketch[positions] = kept.sign() * plain
    sketch = sketch.view(values.shape)
    one, other = (values, sketch) if values.shape[0] <= values.shape[1] else (values.mT, sketch.mT)
    few = one[:_ROWS]
    gram = one @ few.mT
    # Less the entries' own cubes, which are no direction's, and large in what is kept.
    cubes = few**3
    product = (gram * (other @ few.mT)).sum(dtype=torch.float64)
    product -= (cubes * other[:_ROWS]).sum(dtype=torch.float64)
    wanted = gram.square().sum(dtype=torch.float64) - (cubes * few).sum(dtype=torch.float64)
    if product <= 0:
        return 1.0
    return min(max(float(wanted / product), _LEAST_SIZE), _MOST_SIZE)


def _largest(values: Tensor, bits: float) -> tuple[Tensor, Tensor] | None:
    """Where the entries are that are kept, and these; not all of them zero."""
    count = math.floor(values.numel() * share_of(bits / values.numel()))
    if not count:
        return None
    positions = top_k(values, count)
    kept = values[positions]
    return (positions, kept) if kept.any() else None


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
    return Sketched([(symbols, entropy.best(symbols))], 0, scale)


def share_of(bits: float) -> float:
    """ρ where H(ρ) + ρ is so many bits, at most a third."""
    low, high = 0.0, 1 / 3
    for _ in range(50):
        share = (low + high) / 2
        low, high = (low, share) if _rate_of_signs(share) > bits else (share, high)
    return low


def noise(bits: Doubles) -> Doubles:
    """‖X̂ − X‖² / ‖X‖² of a sketch of so many bits per entry."""
    rates, noises = _noises()
    with np.errstate(divide="ignore"):
        few = 0.95 / bits
    return np.where(bits < rates[0], few, np.exp(np.interp(bits, rates, noises)))


def _rate_of_signs(share: float) -> float:
    if not 0 < share < 1:
        return 0.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share) + share


def _deviation_of(bits: float) -> float:
    """Of a Gaussian whose rounded value takes so many bits."""
    grid = np.geomspace(0.1, 60, 400)
    return float(np.interp(bits, rate(grid), grid))


@cache
def _noises() -> tuple[Doubles, Doubles]:
    """Rates, increasing, and the logarithms of their noises."""
    rates, noises = [], []
    for share in np.geomspace(1e-7, 0.2, 60):
        limit = torch.special.ndtri(torch.tensor(share / 2, dtype=torch.float64))
        density = math.exp(-(float(limit) ** 2) / 2) / math.sqrt(2 * math.pi)
        rates.append(_rate_of_signs(share))
        noises.append(math.log(share / (2 * density) ** 2 - 1))
    x = torch.linspace(-8, 8, 40001, dtype=torch.float64)
    weights = torch.exp(-x.square() / 2)
    weights /= weights.sum()
    for deviation in np.geomspace(0.45, 60, 60):
        rounded = (x * deviation).round()
        square, product = (weights * rounded.square()).sum(), (weights * rounded * x).sum()
        bits = float(rate(np.array(deviation)))
        if bits > rates[-1]:
            rates.append(bits)
            noises.append(math.log(float(square / product.square()) - 1))
    return np.array(rates), np.array(noises)
