"""Integer tables of the entropy coder's models: the same on every machine.

Only `decimal` with a set precision is used, whose every operation here (+ - × ÷, `sqrt`, `exp`,
`ln`) is correctly rounded by its specification; no function of the machine's own library.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

PRECISION = 16
"""Frequencies sum to 2^16."""

FRACTION = 20
"""Costs are in units of 2^-20 bits."""

BUCKETS = 10
"""A slot's first 10 bits say where the search for its index starts."""

SCALES = 64
"""Number of standard deviations, spaced evenly in their logarithms from 0.15 to 40."""

LENGTH = 5
"""Bits of the length of what is beyond a table."""

_LEAST, _MOST = Decimal("0.15"), Decimal(40)
_PI = Decimal("3.1415926535897932384626433832795028841971693993751")
_HALF, _SMALL = Decimal("0.5"), Decimal("1e-30")
_LARGEST_LOW = 27
_CONTEXT = Context(40, ROUND_HALF_EVEN, Emin=-999999, Emax=999999, capitals=1, clamp=0, traps=[])


@dataclass(frozen=True, eq=False)
class Table:
    """How a model's symbols are coded; see `entropy` for what the fields mean in the stream."""

    frequencies: NDArray[np.int64]
    """`(1 + indices,)`, each at least 1, their sum 2^16: the escape, then one of each index in
    order. Empty: nothing but the low bits is coded."""
    last: int
    """The largest rest that has an index; the least is `-last` if `signed`, else 0."""
    signed: bool
    """Whether symbols may be negative."""
    low: int
    """How many low bits of a symbol are coded as they are; the others are its rest."""

    @property
    def offset(self) -> int:
        """The index of rest 0."""
        return self.last + 1 if self.signed else min(len(self.frequencies), 1)

    @cached_property
    def cumulative(self) -> NDArray[np.int64]:
        """`(2 + indices,)`, from 0 to 2^16: where each frequency's slots start."""
        return np.concatenate(([0], np.cumsum(self.frequencies)))

    @cached_property
    def first(self) -> NDArray[np.uint16]:
        """`(2^10,)`: the index that holds the first slot of each 2^6."""
        slots = np.arange(1 << BUCKETS) << (PRECISION - BUCKETS)
        found = np.searchsorted(self.cumulative, slots, side="right") - 1
        return found.astype(np.uint16)

    @cached_property
    def costs(self) -> NDArray[np.int64]:
        """Of each index (the escape without what follows it), low bits included; rounded up."""
        whole = PRECISION + self.low << FRACTION
        if not len(self.frequencies):
            return np.array([self.low << FRACTION])
        return whole - _log2(self.frequencies)

    @cached_property
    def cheapest(self) -> int:
        """No symbol costs less; rounded down."""
        return int(self.costs.min()) - 2

    @property
    def escape(self) -> int:
        """Bits that follow an escape, but for as many as the length that they state."""
        return LENGTH + self.signed


def gaussian(scale: int) -> Table:
    """N(0, s²) at the integers."""
    with _decimals():
        deviation = _deviation(scale)
        inner = _within(_HALF / deviation)
        masses = [2 * inner]
        outer = _within(3 * _HALF / deviation)
        while len(masses) < 2 or _rounded(outer - inner):
            masses.append(outer - inner)
            inner, outer = outer, _within((len(masses) + _HALF) / deviation)
        return _two_sided(masses, 1 - 2 * inner)


def laplace(scale: int) -> Table:
    """The Laplace distribution of standard deviation s at the integers."""
    with _decimals():
        rate = Decimal(2).sqrt() / _deviation(scale)
        ratio, edge = (-rate).exp(), (-rate / 2).exp()  # edge: P(|x| > k + 1/2)
        masses = [1 - edge]
        while len(masses) < 2 or _rounded(edge * (1 - ratio) / 2):
            masses.append(edge * (1 - ratio) / 2)
            edge *= ratio
        return _two_sided(masses, edge)


def geometric(count: int, total: int) -> Table:
    """Gaps before `count` positions of `total`, in steps of 2^low, about 8 to 16 to a gap."""
    count, total = max(count, 1), max(total, 1)
    low = min(max((total // count).bit_length() - 4, 0), _LARGEST_LOW)
    with _decimals():
        absent = 1 - Decimal(count) / Decimal(total)
        ratio = (absent.ln() * (1 << low)).exp() if absent else Decimal(0)
        beyond, masses = Decimal(1), list[Decimal]()
        while not masses or _rounded(beyond * (1 - ratio)):
            masses.append(beyond * (1 - ratio))
            beyond *= ratio
        others = [_rounded(mass) for mass in masses[1:]]
        left = (1 << PRECISION) - sum(others)
        escape = min(max(_rounded(beyond), 1), left - 1)
    table = np.array([escape, left - escape, *others], np.int64)
    return Table(table, len(others), False, low)


def fair() -> Table:
    """Bits as they are."""
    return Table(np.empty(0, np.int64), 0, False, 1)


def _two_sided(masses: list[Decimal], beyond: Decimal) -> Table:
    """Of P(0), P(1) = P(-1), …, and of what lies beyond."""
    side = [max(_rounded(mass), 1) for mass in masses[1:]]
    escape = max(_rounded(beyond), 1)
    middle = (1 << PRECISION) - escape - 2 * sum(side)
    table = np.array([escape, *reversed(side), middle, *side], np.int64)
    return Table(table, len(side), True, 0)


@contextmanager
def _decimals() -> Iterator[None]:
    with localcontext(_CONTEXT):
        yield


def _deviation(scale: int) -> Decimal:
    return (_LEAST.ln() + (_MOST / _LEAST).ln() * scale / (SCALES - 1)).exp()


def _within(z: Decimal) -> Decimal:
    """P(0 < x < z) of the standard normal distribution: φ(z) Σ z^(2n+1) / (1·3·…·(2n+1))."""
    square, term, total, odd = z * z, z, z, 1
    while term > _SMALL:
        odd += 2
        term = term * square / odd
        total += term
    return total * (-square / 2).exp() / (2 * _PI).sqrt()


def _rounded(mass: Decimal) -> int:
    """To units of 2^-16; half to even."""
    return int((mass * (1 << PRECISION)).to_integral_value())


def _log2(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """log2 of integers from 1 to 2^16 in units of 2^-20, rounded down; by squaring."""
    whole = np.searchsorted(1 << np.arange(PRECISION + 1), values, side="right") - 1
    found = whole.astype(np.int64)
    mantissa = (values << (31 - whole)).astype(np.uint64)  # in [2^31, 2^32)
    for _ in range(FRACTION):
        mantissa = mantissa * mantissa >> np.uint64(31)
        double = mantissa >> np.uint64(32)
        mantissa >>= double
        found = found << 1 | double.astype(np.int64)
    return found
