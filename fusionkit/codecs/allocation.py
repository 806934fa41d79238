"""Which tensors of which tasks get how many bytes of a budget, from their singular values alone.

One number, B, says all: the sketch's bits per parameter. A task's share of it is its delta's
energy to the power ⅓, times 1 + ν / 0.3, where the noise ν = E / (B_t W) is about its error's
energy over the base's: where noise is felt, the largest deltas are the first to fail. The price of
a bit follows, θ = 0.3 E / (B N): as many directions are kept as are worth it, and what is left of
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
from fusionkit.codecs.quantized_factors import Doubles, cost, least_kept, rate
from fusionkit.codecs.rounded_sketch import MOST, noise

Share = Literal["energy", "equal"]

_PRICE = 0.3
"""θ B N / E."""
_FELT = 0.3
"""Noise over the base's energy at which a task gets twice its share."""
_CHEAPEST = 0.25
"""B from which on directions get no cheaper: noise has directions, too, that a sketch takes
better."""
_SHRUNK = 2.5
"""How much a sketch is shrunk where its noise is felt."""
_LEAST, _GREATEST = 1e-7, 1e9
"""Sketch's bits per parameter, between which B is looked for."""
_NEAR = 1 + 1e-6
"""Ratio of two numbers that are as good as one."""
_WORTH = 4
"""A tensor may be left out whose codes would be a fourth of its entry in the header, or less."""


Among = list[NDArray[np.bool_] | None]
"""Of each task, which tensors may be stored; None: all."""


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
        errors: `(K,)`, energy of each tensor's error.
    """

    nbytes: NDArray[np.int64]
    ranks: NDArray[np.int64]
    theta: float
    shrunk: float
    total: int
    errors: Doubles

    @property
    def error(self) -> float:
        """Energy of the whole error."""
        return float(self.errors.sum())

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

    @property
    def _price(self) -> float:
        """θ B; more than 0."""
        sizes = self.rows * self.columns
        return max(_PRICE * self.energy / max(float(sizes.sum()), 1.0), 1e-300)

    def plan(self, bits: float, among: NDArray[np.bool_] | None = None) -> Plan:
        """What all tensors take if the sketch has so many bits per parameter.

        Args:
            bits: B.
            among: bool `(K,)`, which tensors may be stored; None: all.
        """
        theta, ranks, coded, shrunk, errors = self._spent(bits)
        entries = self._entries(coded)
        # What takes few bits is left out, unless it holds so much of the energy that it is worth
        # them and its entry.
        few = coded * _WORTH <= 8 * entries
        price = 2 * math.log(2) * self._price / bits * (coded + 8 * entries)
        out = (coded == 0) | (few & (self.energies <= price))
        if among is not None:
            out |= ~among
        nbytes = np.where(out, 0, np.ceil(coded / 8) + self.beside)
        return Plan(
            nbytes.astype(np.int64),
            np.where(out, 0, ranks).astype(np.int64),
            theta,
            shrunk,
            int(nbytes.sum() + entries[~out].sum()),
            np.where(out, self.energies, errors),
        )

    def bits_for(self, error: float) -> float:
        """The least B from which on the error's energy is no more.

        What is small enough to be left out whole is still not: it is the sketch's noise that is
        to be so small.
        """

        def quiet(bits: float) -> bool:
            plan = self.plan(bits)
            return plan.error <= error and bool(plan.nbytes.any())

        def low(bits: float) -> bool:
            return bool(self._spent(bits).errors.sum() <= error)

        # Not from below: of next to nothing the sketch is shrunk, and its error the delta itself.
        loud, least = _GREATEST / 2, _GREATEST
        while low(loud) and loud > _LEAST:
            loud, least = loud / 2, loud
        least = _bisect(low, loud, least)
        return least if quiet(least) else _bisect(quiet, least, _GREATEST)

    def _spent(self, bits: float) -> "_Spent":
        """What all tensors take if none is left out."""
        sizes = self.rows * self.columns
        theta = self._price / (min(bits, _CHEAPEST) if self.sketched else bits)
        ranks, coded, left = self._directions(theta)
        of_sketch = np.zeros_like(left)
        if self.sketched:
            of_sketch = self._sketches(bits, left)
        vectors = self._vectors(self._price / bits)
        with np.errstate(divide="ignore", invalid="ignore"):
            rates = np.where(self._matrices, of_sketch, vectors) / sizes
            errors = np.minimum(np.where(rates > 0, left * noise(rates), left), 1e300)
        shrunk = self._shrunk(errors)
        noisy = self._matrices & (of_sketch > 0)
        errors = np.where(noisy, shrunk**2 * errors + (1 - shrunk) ** 2 * left, errors)
        return _Spent(theta, ranks, coded + of_sketch + vectors, shrunk, errors)

    def _shrunk(self, errors: Doubles) -> float:
        """η, where a sketch would have these errors without."""
        if not self.sketched or not self.base:
            return 1.0
        return 1 / (1 + _SHRUNK * float((self.felt * errors)[self._matrices].sum()) / self.base)

    def _entries(self, coded: Doubles) -> Doubles:
        """Bytes of the entry of each tensor's codes, of so many bits."""
        small = (coded / 8 + self.beside + 1 < SMALL) & self.packed
        return np.where(small, PACKED_ENTRY, self.entries)

    @property
    def least(self) -> int:
        """Bytes in which not every tensor can be left out."""
        entries = self._entries(np.zeros_like(self.entries))
        return math.ceil(float((entries * (1 + 1 / _WORTH)).sum())) + 1 + self.beside

    @cached_property
    def nothing(self) -> Plan:
        """Of a task of which nothing is stored."""
        none = np.zeros(len(self.energies), np.int64)
        return Plan(none, none, 0.0, 1.0, 0, self.energies)

    @cached_property
    def _matrices(self) -> NDArray[np.bool_]:
        return self.rows > 1

    @cached_property
    def _all(self) -> tuple[NDArray[np.int64], Doubles, Doubles]:
        """All directions: the tensor of each, σ², and −θ from which on it is kept; increasing."""
        counts = [len(own) for own in self.squares]
        owners = np.repeat(np.arange(len(counts)), counts)
        squares = np.concatenate([np.empty(0), *self.squares])
        least = least_kept(self.rows, self.columns)[owners]
        order = np.argsort(-squares / least, kind="stable")
        return owners[order], squares[order], (-squares / least)[order]

    def _directions(self, theta: float) -> tuple[NDArray[np.int64], Doubles, Doubles]:
        """Per tensor how many directions are kept, their bits, and the energy that is left."""
        owners, squares, limits = self._all
        count, kept = len(self.energies), int(np.searchsorted(limits, -theta))
        owners, squares = owners[:kept], squares[:kept]
        ranks = np.bincount(owners, minlength=count)
        weakest = np.full(count, np.inf)
        np.minimum.at(weakest, owners, squares)
        bits, errors = cost(
            squares, weakest[owners], self.rows[owners], self.columns[owners], theta, self.exponent
        )
        left = self.energies - np.bincount(owners, squares - errors, count)
        coded = np.bincount(owners, bits, count).astype(np.float64)
        return ranks.astype(np.int64), coded, left.clip(0).astype(np.float64)

    def _sketches(self, bits: float, left: Doubles) -> Doubles:
        """Each matrix's bits, by its deviation; what is too much for one is the others'."""
        sizes = self.rows * self.columns
        weights = np.where(self._matrices, np.sqrt(sizes * left * self.felt), 0.0)
        found, total = np.zeros_like(weights), bits * float(sizes.sum())
        open_ = weights > 0
        while open_.any() and total > 0:
            shares = weights * (total / float(weights[open_].sum()))
            full = open_ & (shares >= MOST * sizes)
            if not full.any():
                return np.where(open_, shares, found)
            found[full] = MOST * sizes[full]
            total -= float(found[full].sum())
            open_ &= ~full
        return found

    def _vectors(self, theta: float) -> Doubles:
        """Bits of each tensor that is no matrix, where it is worth them."""
        sizes = np.maximum(self.columns, 1.0)
        bits = np.minimum(sizes * rate(np.sqrt(self.energies / sizes / (12 * theta))), MOST * sizes)
        gain = self.energies - theta * sizes
        worth = gain > 2 * math.log(2) * theta * (bits + 8 * self._entries(bits))
        return np.where(worth & ~self._matrices, bits, 0.0)


class _Spent(NamedTuple):
    """Bits and errors of each tensor: `(K,)`."""

    theta: float
    ranks: NDArray[np.int64]
    bits: Doubles
    shrunk: float
    errors: Doubles


@dataclass(frozen=True)
class Division:
    """How the tasks divide B among them.

    Attributes:
        spectra: of each task.
        share: of B, by the tasks' energies, or the same for all.
    """

    spectra: Sequence[Spectra]
    share: Share

    def within(self, budget: int) -> list[Plan]:
        """The plans at the largest B at which all fit into so many bytes."""
        everything: Among = [None] * len(self.spectra)
        bits = self._largest(budget, everything, self._least)
        if not bits:
            return [own.nothing for own in self.spectra]
        # What a further tensor's entry would not have fitted into is for those that are stored.
        stored: Among = [plan.nbytes > 0 for plan in self._plans(bits, everything)]
        return self._plans(self._largest(budget, stored, bits), stored)

    def quiet(self, error: float) -> int:
        """About how many bytes leave no task's error more energy; see `Spectra.bits_for`."""
        bits = max(self._common(own.bits_for(error), i) for i, own in enumerate(self.spectra))
        return sum(plan.total for plan in self._plans(bits, [None] * len(self.spectra)))

    @property
    def _least(self) -> float:
        """B at which no task has anything, however its noise is felt."""
        return min(self._common(_LEAST, task) for task in range(len(self.spectra)))

    def _common(self, its: float, task: int) -> float:
        """B of all, from what one task is to have of it."""
        _, weight, felt = self._tasks[task]
        return its**2 / (its + felt) / weight

    @cached_property
    def _tasks(self) -> list[tuple[Spectra, float, float]]:
        """Of each task its factor of B, and what noise adds to it: B_t² = B_t w B + w B f."""
        energies = [each.energy for each in self.spectra]
        felt = [0.0] * len(energies)
        if self.share == "energy":
            felt = [
                own.energy / (_FELT * own.base) if own.sketched and own.base else 0.0
                for own in self.spectra
            ]
        return list(zip(self.spectra, shares(energies, self.share), felt, strict=True))

    def _plans(self, bits: float, among: Among) -> list[Plan]:
        found = []
        for (own, weight, felt), stored in zip(self._tasks, among, strict=True):
            its = bits * weight
            found.append(own.plan((its + math.sqrt(its**2 + 4 * its * felt)) / 2, stored))
        return found

    def _largest(self, budget: int, among: Among, least: float) -> float:
        """The largest B at which all fit; 0: at the least they don't."""

        def over(bits: float) -> bool:
            return sum(plan.total for plan in self._plans(bits, among)) > budget

        return 0.0 if over(least) else _bisect(over, least, _GREATEST, upper=False)


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
    while high > low * _NEAR:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high if upper else low
