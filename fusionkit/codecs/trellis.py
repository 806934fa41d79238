"""A code of Gaussian numbers, near the least noise that so many bits allow: a trellis.

Every bit says something of all numbers for a while, as it is read in a window of ten that moves on
by one (Marcellin and Fischer 1990; the window of bits is that of QTIP, 2406.11235). Which bits say
it best is found by Viterbi's algorithm. Of N numbers and n bits, rate n / N, whatever it is:

**Steps.** There are n; step `t` describes the numbers from `⌊t N / n⌋` on and before
`⌊(t + 1) N / n⌋`: several, or none. Number `e` is that of step `⌊((e + 1) n − 1) / N⌋`.

**States.** Bit `i` of the stream is bit `i mod 8` of byte `i div 8`. The state at step `t` is the
number of ten bits, the lowest first, from bit `t + 9 (t div 8192)` on: each 8192 steps begin anew,
so that they can be looked for side by side, and so have nine bits more.

**Values.** The `v`-th number of a step, from 0 on, is about `value(s, v)` times a scale, in a state
`s`: with `r = (s + 613 (v div 64)) mod 1024`, it is the sum of the eight bytes of word
`64 r + (v mod 64)` of SplitMix64 from 0 on, less 1020: nearly Gaussian, of deviation 209. Words are
as in `rotation`: `w[i] = mix(i γ)`.

The best scale is not that of least error, but the one at which what comes back has the right size,
⟨x̂, x⟩ = ‖x‖², which is for who calls. Then the noise is that of `noise`, ‖x̂ − x‖² / ‖x‖²: times
the rate, 0.77 at a tenth of a bit, of which 0.67 is what theory allows, R / (4^R − 1); the signs of
the largest numbers, entropy coded, have 1.0. The code is in no direction: of numbers that are not
Gaussian, but alike over the hundred or so that a window spans, what comes back is noisy, not bent.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionkit.codecs.quantized_factors import Doubles
from fusionkit.codecs.rotation_sides import drawn
from fusionkit.codecs.threads import over

WINDOW, STATES = 10, 1 << 10
"""Bits that a state is, and how many there are."""
SEGMENT = 8192
"""Steps that are looked for at once."""
COLUMNS = 64
"""Numbers of a step that have words of their own."""
APART = 613
"""How many states on the words of the next of them are."""
MOST = 1.5
"""Bits a number, at most. Of more, numbers are rounded to integers: no number is too large for
that, and its noise, a fifth more there, is less the more bits there are."""
WIDEST = 4096
"""Numbers of a step, at most."""
DEVIATION = 209.0
"""Of values; the root of 8 (256² − 1) / 12."""

_RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.5)
_NOISES = (81.0, 40.3, 15.8, 7.64, 3.575, 1.848, 1.165, 0.717, 0.525, 0.3983, 0.2615, 0.1777)


def steps_in(bits: float, numbers: int) -> int:
    """How many steps fit into so many bits, at most the most that there can be; 0: too few do."""
    segments = -(-int(bits) // (SEGMENT + WINDOW - 1))
    steps = max(int(bits) - segments * (WINDOW - 1), (segments - 1) * SEGMENT)
    steps = min(steps, _most_steps(numbers))
    return steps if steps > 0 and numbers <= WIDEST * steps else 0


def size_of(steps: int) -> int:
    """Bytes of the stream of so many steps."""
    return (steps + -(-steps // SEGMENT) * (WINDOW - 1) + 7) // 8


def check(stream: Tensor, steps: int, numbers: int) -> None:
    """Refuse a stream that can't be of so many steps and numbers.

    Raises:
        ValueError: it can't.
    """
    if not 0 < steps <= _most_steps(numbers) or numbers > WIDEST * steps:
        raise ValueError(f"no trellis of {numbers} entries has {steps} steps")
    if len(stream) != size_of(steps):
        raise ValueError(
            f"{len(stream)} bytes are not the {size_of(steps)} of a trellis of {steps} steps"
        )


class Groups(NamedTuple):
    """Numbers in a row that count alike.

    Attributes:
        ends: int64 `(groups,)`, the number after the last of each; none is empty.
        weights: float64 `(groups,)`, what their products count for.
    """

    ends: NDArray[np.int64]
    weights: Doubles


def search(numbers: Tensor, steps: int, groups: Groups | None = None) -> tuple[Tensor, float]:
    """The bits of least noise, and ⟨x, x̂⟩.

    Args:
        numbers: float32 `(N,)` on the CPU, about Gaussian, of deviation 1.
        steps: n, as `steps_in` has it.
        groups: what the product counts; all alike if not given.

    Returns:
        uint8 `(size_of(steps),)` and a float; the same on any number of threads.
    """
    from fusionkit.codecs import trellis_kernels as kernels

    count = len(numbers)
    ends, weights = groups or Groups(np.array([count]), np.ones(1))
    values = _values(count, steps) / np.float32(DEVIATION)
    columns = np.ascontiguousarray(values.reshape(-1, 16, values.shape[1]).transpose(0, 2, 1))
    # Of least error: of x − a x̂, but for ‖x‖², with the scale at which a Gaussian's is least.
    shrunk = (1 - 4.0 ** -(steps / count)) ** 0.5
    prices = np.zeros((values.shape[1] + 1, STATES), np.float32)
    prices[1:] = np.cumsum(-0.5 * shrunk * values.T.astype(np.float64) ** 2, 0)
    segments = -(-steps // SEGMENT)
    bits = np.zeros((segments, SEGMENT + WINDOW - 1), np.uint8)
    given, products = np.ascontiguousarray(numbers.numpy()), np.zeros(segments)

    def run(begin: int, end: int) -> None:
        for segment in range(begin, end):
            first = segment * SEGMENT
            last = min(first + SEGMENT, steps)
            products[segment] = kernels.search(
                given, steps, first, last, columns, prices, (ends, weights), bits[segment]
            )

    over(segments, 1, count, run)
    wanted = steps + segments * (WINDOW - 1)
    stream = torch.from_numpy(np.packbits(bits.reshape(-1)[:wanted], bitorder="little"))
    return stream, float(products.sum()) * DEVIATION


def look_up(stream: Tensor, steps: int, numbers: int, begin: int, end: int) -> Tensor:
    """Values of some numbers: float32 `(end - begin,)`, on the stream's device.

    Args:
        stream: uint8 `(size_of(steps),)`.
        steps: n.
        numbers: N.
        begin: the first.
        end: the one after the last, more than that.
    """
    device = stream.device
    e = torch.arange(begin, end, device=device)
    t = ((e + 1) * steps - 1) // numbers
    v = e - t * numbers // steps
    at = t + t // SEGMENT * (WINDOW - 1)
    first, last = int(at[0]) >> 3, int(at[-1]) >> 3
    data = torch.nn.functional.pad(stream[first : last + 3], (0, 2)).to(torch.int64)
    byte = (at >> 3) - first
    word = data[byte] | data[byte + 1] << 8 | data[byte + 2] << 16
    state = (word >> (at & 7) & STATES - 1) + APART * (v // COLUMNS)
    words = torch.from_numpy(_words()).to(device)
    return words[state % STATES, v % COLUMNS]


def table(numbers: int, steps: int) -> NDArray[np.float32]:
    """Values by state, `(1024, p)`, of a step's first 64 numbers at most, p a multiple of 16."""
    return _table(min(_widest(numbers, steps), COLUMNS))


def noise(rates: Doubles) -> Doubles:
    """‖x̂ − x‖² / ‖x‖² at so many bits a number, up to `MOST`."""
    with np.errstate(divide="ignore"):
        few = _RATES[0] * _NOISES[0] / rates
        between = np.exp(np.interp(np.log(rates), np.log(_RATES), np.log(_NOISES)))
    return np.where(rates < _RATES[0], few, between)


def _most_steps(numbers: int) -> int:
    """MOST a number; no more than 32 bits can say, or of which places are beyond 63 bits."""
    return min(int(MOST * numbers), (1 << 32) - 1, ((1 << 63) - 1) // max(numbers, 1))


def _widest(numbers: int, steps: int) -> int:
    """Numbers of a step, at most."""
    return -(-numbers // steps)


@lru_cache(maxsize=1)
def _words() -> NDArray[np.float32]:
    """`value(s, v)` of v up to 63: float32 `(1024, 64)`."""
    words = drawn(np.zeros(1, np.uint64), STATES * COLUMNS)
    parts = words.astype("<u8").view(np.uint8).reshape(STATES, COLUMNS, 8)
    values: NDArray[np.float32] = (parts.sum(2, dtype=np.int64) - 1020).astype(np.float32)
    return values


@lru_cache(maxsize=8)
def _table(columns: int) -> NDArray[np.float32]:
    padded = -(-columns // 16) * 16
    found = np.zeros((STATES, padded), np.float32)
    found[:, :columns] = _words()[:, :columns]
    return found


def _values(numbers: int, steps: int) -> NDArray[np.float32]:
    """Values of all numbers that a step can have: float32 `(1024, widest)`."""
    widest, words = _widest(numbers, steps), _words()
    parts: Sequence[NDArray[np.float32]] = [
        np.roll(words, -APART * place, 0)[:, : widest - COLUMNS * place]
        for place in range(-(-widest // COLUMNS))
    ]
    return np.concatenate(parts, 1)
