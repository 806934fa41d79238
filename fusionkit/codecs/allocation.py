"""Which tensors of which tasks get how many bytes of a budget, from their singular values alone.

One number, B, says all: the sketch's bits per parameter. A task's share of it is its delta's
energy to the power ⅓, times 1 + ν / 0.3, where the noise ν = E / (B_t W) is about its error's
energy over the base's: where noise is felt, the largest deltas are the first to fail. The price of
a bit follows, θ = 0.2 E / (B N): as many directions are kept as are worth it, and what is left of
the matrices shares the sketch's bits by its deviation, times the root of how much it is felt where
that is known: so its error is felt least. B is found so that all together, headers included, fits
into the budget. Every tensor is given so many bytes, which its codes keep to by themselves: what is
written is never more than was asked for.

Where noise is felt, a sketch of less than the delta's size is the better one: it is multiplied by
η = 1 / (1 + 2.5 ν), which at a tenth of a bit is 0.99 of most models.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusionkit.codecs.overhead import PACKED_ENTRY, SMALL
from fusionkit.codecs.quantized_factors import Doubles, cost, rate, worth_keeping
from fusionkit.codecs.sign_sketch import MOST, noise

Share = Literal["energy", "equal"]

_PRICE = 0.2
"""θ B N / E."""
_FELT = 0.3
"""Noise over the base's energy at which a task gets twice its share."""
_CHEAPEST = 0.25
"""B from which on directions get no cheaper: noise has directions, too, that a sketch takes
better."""
_SHRUNK = 2.5
"""How much a sketch is shrunk where its noise is felt."""
_LEAST, _GREATEST = 1e-7, 64.0
"""Sketch's bits per parameter, between which B is looked for."""
_WORTH = 4
"""A tensor is left out whose codes would be a fourth of its entry in the header, or less."""


class Allowance(NamedTuple):
    """What one tensor's codes may take: bytes, directions, the price θ of a bit in error; and η."""

    nbytes: int
    rank: int
    theta: float
    shrunk: float


@dataclass(frozen=True)
class Plan:
    """What one task's tensors may take at one B.

    Attributes:
        nbytes: int64 `(K,)`, of each tensor's codes; 0: it is left out.
        ranks: int64 `(K,)`, how many directions are kept.
        theta: the error per entry at which bits are bought.
        shrunk: η, by which the sketch is multiplied.
        total: bytes of all, with their entries in the header.
        error: energy of the error.
    """

    nbytes: NDArray[np.int64]
    ranks: NDArray[np.int64]
    theta: float
    shrunk: float
    total: int
    error: float

    def of(self, place: int) -> Allowance:
        """What one tensor may take."""
        return Allowance(int(self.nbytes[place]), int(self.ranks[place]), self.theta, self.shrunk)


@dataclass(frozen=True)
class Spectra:
    """What is known of one task's vectors, tensor by tensor.

    Attributes:
        base: ‖θ₀‖², of all matrices.
        energies: `(K,)`, ‖δ‖² of each tensor.
        squares: of each matrix, σ² of its leading directions; empty of a vector.
        rows: `(K,)`; 1 of a vector.
        columns: `(K,)`; a vector's entries.
        entries: `(K,)`, bytes of each one's entry in the file's header.
        packed: whether codes of few bytes are packed, and have small entries.
        beside: bytes of any codes that are not counted in bits.
        exponent: e; see `quantized_factors`.
        sketched: whether what the directions leave is sketched, and so costs bits.
        felt: `(K,)`, how much the outputs feel an error in each, in relation to the others; 1 of
            all where no data have told.
    """

    base: float
    energies: Doubles
    squares: Sequence[Doubles]
    rows: Doubles
    columns: Doubles
    entries: Doubles
    packed: bool
    beside: int
    exponent: float
    sketched: bool
    felt: Doubles

    @cached_property
    def energy(self) -> float:
        """Of the matrices; of all, where there are none."""
        of_matrices = float(self.energies[self._matrices].sum())
        return of_matrices or float(self.energies.sum())

    def plan(self, bits: float) -> Plan:
        """What all tensors take if the sketch has so many bits per parameter."""
        sizes = self.rows * self.columns
        price = _PRICE * self.energy / max(float(sizes.sum()), 1.0)
        if not price > 0:
            return self.nothing
        theta = price / (min(bits, _CHEAPEST) if self.sketched else bits)
        ranks, coded, left = self._directions(theta)
        weights = np.where(self._matrices, np.sqrt(sizes * left * self.felt), 0.0)
        shares = weights / max(float(weights.sum()), 1e-300)
        of_sketch = np.minimum(bits * float(sizes.sum()) * shares, MOST * sizes)
        if not self.sketched:
            of_sketch = np.zeros_like(of_sketch)
        vectors, kept = self._vectors(price / bits)
        total_bits = coded + of_sketch + np.where(kept, vectors, 0.0)
        nbytes = np.ceil(total_bits / 8) + self.beside
        entries = np.where(self._fits_pack(nbytes), PACKED_ENTRY, self.entries)
        out = total_bits * _WORTH <= 8 * (entries + self.beside)
        nbytes = np.where(out, 0, nbytes)
        with np.errstate(divide="ignore", invalid="ignore"):
            noises = np.where(of_sketch > 0, left * noise(of_sketch / sizes), left)
        sketched = self._matrices & ~out
        shrunk = self._shrunk(float((self.felt * noises)[sketched].sum()))
        if self.sketched:
            noises = shrunk**2 * noises + (1 - shrunk) ** 2 * left
        error = np.where(out, self.energies, np.where(self._matrices, noises, price / bits * sizes))
        return Plan(
            nbytes.astype(np.int64),
            np.where(out, 0, ranks).astype(np.int64),
            theta,
            shrunk,
            int(nbytes.sum() + entries[~out].sum()),
            float(np.minimum(error, np.inf).sum()),
        )

    def bits_for(self, error: float) -> float:
        """The least B at which the error's energy is no more."""
        return _bisect(lambda bits: self.plan(bits).error <= error, _LEAST, _GREATEST)

    @cached_property
    def nothing(self) -> Plan:
        """Of a task of which nothing is stored."""
        none = np.zeros(len(self.energies), np.int64)
        return Plan(none, none, 0.0, 1.0, 0, float(self.energies.sum()))

    def _shrunk(self, error: float) -> float:
        """η, where a sketch would have this error without."""
        if not self.sketched or not self.base:
            return 1.0
        return 1 / (1 + _SHRUNK * error / self.base)

    def _fits_pack(self, nbytes: Doubles) -> NDArray[np.bool_]:
        return (nbytes < SMALL) & self.packed

    @cached_property
    def _matrices(self) -> NDArray[np.bool_]:
        return self.rows > 1

    @cached_property
    def _all(self) -> tuple[Doubles, NDArray[np.int64]]:
        """The squares of all matrices, and which each is of."""
        counts = [len(own) for own in self.squares]
        owners = np.repeat(np.arange(len(counts)), counts)
        return np.concatenate([np.empty(0), *self.squares]), owners

    def _directions(self, theta: float) -> tuple[NDArray[np.int64], Doubles, Doubles]:
        """Per tensor how many directions are kept, their bits, and the energy that is left."""
        squares, owners = self._all
        count = len(self.energies)
        kept = worth_keeping(squares, self.rows[owners], self.columns[owners], theta)
        squares, owners = squares[kept], owners[kept]
        ranks = np.bincount(owners, minlength=count)
        weakest = np.full(count, np.inf)
        np.minimum.at(weakest, owners, squares)
        bits, errors = cost(
            squares, weakest[owners], self.rows[owners], self.columns[owners], theta, self.exponent
        )
        left = self.energies - np.bincount(owners, squares - errors, count)
        coded = np.bincount(owners, bits, count).astype(np.float64)
        return ranks.astype(np.int64), coded, left.clip(0).astype(np.float64)

    def _vectors(self, theta: float) -> tuple[Doubles, NDArray[np.bool_]]:
        """Bits of each tensor that is no matrix, and whether they are worth it."""
        sizes = np.maximum(self.columns, 1.0)
        bits = sizes * rate(np.sqrt(self.energies / sizes / (12 * theta)))
        entries = np.where(self._fits_pack(bits / 8 + self.beside), PACKED_ENTRY, self.entries)
        gain = self.energies - theta * sizes
        worth = gain > 2 * math.log(2) * theta * (bits + 8 * (entries + self.beside))
        return bits, worth & ~self._matrices


def within(spectra: Sequence[Spectra], budget: int, fixed: int, share: Share) -> list[Plan]:
    """The tasks' plans at the largest B at which all fit into a budget.

    Args:
        spectra: of each task.
        budget: bytes.
        fixed: bytes that are taken already.
        share: of B, by the tasks' energies, or the same for all.
    """
    energies = [each.energy for each in spectra]
    weights = shares(energies, share)

    def plans(bits: float) -> list[Plan]:
        found = []
        for own, weight in zip(spectra, weights, strict=True):
            its = bits * weight
            if share == "energy" and own.sketched and own.base:
                its = (its + math.sqrt(its**2 + 4 * its * own.energy / (_FELT * own.base))) / 2
            found.append(own.plan(its))
        return found

    def over(bits: float) -> bool:
        return fixed + sum(plan.total for plan in plans(bits)) > budget

    if over(_LEAST):
        return [own.nothing for own in spectra]
    return plans(_bisect(over, _LEAST, _GREATEST, upper=False))


def shares(energies: Sequence[float], share: Share) -> list[float]:
    """Each task's factor of B; their mean is 1 by the energies."""
    if share == "equal" or not any(energies):
        return [1.0] * len(energies)
    roots = [energy ** (1 / 3) for energy in energies]
    mean = sum(roots) / len(roots)
    return [max(root / mean, 1e-3) for root in roots]


def _bisect(enough: Callable[[float], bool], low: float, high: float, upper: bool = True) -> float:
    """The number from which on something holds, from above, or from below where it doesn't."""
    if not enough(high):
        return high
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high if upper else low
