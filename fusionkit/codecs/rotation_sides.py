"""One side of a `rotation`: its signs and its permutation, as steps that loops can take."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class Side:
    """A rotation of one side, or its inverse, as steps that are the same for either.

    Times `factors[0]`; H on the first window; the second window times `factors[1]`; H on it; entry
    `i` taken from `order[i]`; times `factors[2]`; H; times `factors[3]`; H; times `factors[4]`. H
    is the matrix of ±1: its norm is within the factors, and so are the signs of what lies outside
    the second window. If there is one window, `factors[1]`, `factors[3]` and the second H after
    each are left out.

    Args:
        windows: where the two windows start, int64 `(2,)`; the same if there is one.
        power: the windows' size.
        order: int64 `(n,)`.
        factors: float32 `(5, n)`.
    """

    windows: NDArray[np.int64]
    power: int
    order: NDArray[np.int64]
    factors: NDArray[np.float32]

    def steps(self) -> tuple[NDArray[np.int64], int, NDArray[np.int64], NDArray[np.float32]]:
        """As the compiled loops take them."""
        return self.windows, self.power, self.order, self.factors


def side_of(seed: int, side: int, size: int, inverse: bool, place: int = 0) -> Side:
    """The steps of one side: `R`, or its inverse.

    Args:
        seed: see `rotation.rotate`.
        side: 0 for the rows' index, 1 for the columns'.
        size: n.
        inverse: whether it is undone.
        place: see `rotation.rotate`.
    """
    steps = _steps(seed, side, size, inverse)
    factors = steps.factors.copy()
    factors[4 if inverse else 0] *= flips(seed, side, size, place)
    return Side(steps.windows, steps.power, steps.order, factors)


@lru_cache(maxsize=32)
def _steps(seed: int, side: int, size: int, inverse: bool) -> Side:
    """The same of W P W: what is drawn for a size once."""
    order, signs = draw(seed, side, size)
    power = 1 << max(size.bit_length() - 1, 0)
    start = max(size - power, 0)
    one, first, last = np.ones((3, size), np.float32)
    first[:power] = last[start:] = power**-0.5
    s1, s2, s3, s4 = signs
    if inverse:
        back = np.empty_like(order)
        back[order] = np.arange(size)
        factors = np.stack([last, s4 * first, s3[back] * last, s2 * first, s1])
        windows, order, outside = [start, 0], back, slice(power, None)
    else:
        factors = np.stack([s1 * first, s2 * last, s3 * first, s4 * last, one])
        windows, outside = [0, start], slice(0, start)
    if start:  # signs of what lies outside the second window go to the factors after it
        signs = np.ones((2, size), np.float32)
        signs[:, outside] = factors[1:4:2, outside]
        factors[1:4:2, outside] = 1
        factors[2] *= signs[0, order]
        factors[4] *= signs[1]
    return Side(np.array(windows), power, order, factors)


@lru_cache(maxsize=32)
def mixing_of(seed: int, size: int, inverse: bool) -> Side:
    """The steps of `P W(s₁, s₂) ⊗ H₁₆`, of the columns' side, or of the inverse: see `mixing`.

    Forward: two windows, the second times `factors[1]`; from there, times `factors[2]`, to `order`.
    The inverse: from there, times `factors[2]`; two windows, the second times `factors[3]`. The
    signs that remain, first or last, are `factors[4]`.
    """
    order, (s1, s2, _, _) = draw(seed, 1, size)
    power = 1 << max(size.bit_length() - 1, 0)
    start = max(size - power, 0)
    one, first, last, beyond = np.ones((4, size), np.float32)
    first[:power] = last[start:] = power**-0.5
    back = np.empty_like(order)
    back[order] = np.arange(size)
    if start:
        beyond[power:] = s2[power:]
    between = s2 * first * beyond
    if inverse:
        factors = np.stack([one, one, last / 4, between, s1 * beyond])
        return Side(np.array([start, 0]), power, back, factors)
    after = last / 4
    if start:
        after[:start] *= between[:start]
    factors = np.stack([one, between, after, one, s1 * beyond])
    return Side(np.array([0, start]), power, back, factors)


def draw(seed: int, side: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The permutation and the four vectors of signs: see `rotation`.

    Args:
        seed: at least 0 and less than 2⁶⁴.
        side: 0 for the rows' index, 1 for the columns'.
        size: n.

    Returns:
        `order`, int64 `(n,)`, and float32 `(4, n)` of 1 and −1.
    """
    words = drawn(_key(seed, side, size), size)
    bits = words >> np.arange(4, dtype=np.uint64)[:, None] & np.uint64(1)
    return np.argsort(words, kind="stable"), 1 - 2 * bits.astype(np.float32)


@lru_cache(maxsize=256)
def flips(seed: int, side: int, size: int, place: int) -> NDArray[np.float32]:
    """D's diagonal, of 1 and −1, of a matrix's place: float32 `(n,)`; see `rotation`."""
    key = _mix(_key(seed, side, size)) ^ np.uint64(place)
    words = drawn(_mix(key), -(-size // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[:size]
    return 1 - 2 * bits.astype(np.float32)


def drawn(key: Words, count: int) -> Words:
    """The first words of SplitMix64 from a state on: uint64 `(count,)`."""
    return _mix(key + np.arange(count, dtype=np.uint64) * _GAMMA)


def _key(seed: int, side: int, size: int) -> Words:
    key = np.array([seed], np.uint64)
    for word in (side, size):
        key = _mix(key) ^ np.uint64(word)
    return _mix(key)


def _mix(words: Words) -> Words:
    """SplitMix64's next word, of each state."""
    words = words + _GAMMA
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)
