"""What `Sketch` stores, read by the descriptions alone: in Python's numbers, one step at a time.

Of `fusionkit/codecs/entropy.py`, `rotation.py`, `trellis.py`, `mixing.py`, `sketch_codes.py` and
`bundles/small_parts.py` the docstrings are followed, and no code is used.
"""

import math
import struct
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

Parts = dict[str, Tensor]
MASK, GAMMA = 2**64 - 1, 0x9E3779B97F4A7C15
NOTHING, SIGNS, INTEGERS, PLAIN, TRELLIS = range(5)


class Table(NamedTuple):
    """Frequencies that sum to 2^16, of the escape and of each index; without any: bare bits."""

    frequencies: list[int]
    last: int
    signed: bool
    low: int


def decode(stream: bytes, wanted: Sequence[tuple[int, Table]]) -> list[list[int]]:
    """The symbols of a coded stream, so many of each model."""
    state = int.from_bytes(stream[:6], "little") + 2**16
    words = [int.from_bytes(stream[at : at + 2], "little") for at in range(6, len(stream), 2)]

    def refill() -> None:
        nonlocal state
        if state < 2**32 and words:
            state = state * 2**16 + words.pop(0)

    def bits(k: int) -> int:
        nonlocal state
        found = 0
        for done in range(0, k, 16):
            step = min(k - done, 16)
            found += state % 2**step << done
            state //= 2**step
            refill()
        return found

    def index(frequencies: list[int]) -> int:
        nonlocal state
        slot, i, before = state % 2**16, 0, 0
        while before + frequencies[i] <= slot:
            before += frequencies[i]
            i += 1
        state = frequencies[i] * (state // 2**16) + slot - before
        refill()
        return i

    def symbol(table: Table) -> int:
        if not table.frequencies:
            return bits(table.low)
        i = index(table.frequencies)
        if i:
            rest = i - 1 - (table.last if table.signed else 0)
            return rest * 2**table.low + bits(table.low)
        length = bits(5)
        number = bits(table.low + length + table.signed)
        extra, number = number % 2**table.low, number >> table.low
        rest = table.last + 2**length + number % 2**length
        return (-rest if number >> length else rest) * 2**table.low + extra

    found = [[symbol(table) for _ in range(number)] for number, table in wanted]
    assert state == 2**16
    assert not words
    return found


def mix(z: int) -> int:
    """SplitMix64."""
    z = (z + GAMMA) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def rotation(seed: int, side: int, n: int, place: int) -> Tensor:
    """R, float64 `(n, n)`, of dense matrices."""
    first, second, order = halves(seed, side, n)
    return second @ torch.eye(n, dtype=torch.float64)[order] @ first @ flipped(seed, side, n, place)


def halves(seed: int, side: int, n: int) -> tuple[Tensor, Tensor, list[int]]:
    """W(s₁, s₂) and W(s₃, s₄), float64 `(n, n)`, and the order."""
    k = mix(mix(mix(seed) ^ side) ^ n)
    words = [mix((k + i * GAMMA) & MASK) for i in range(n)]
    s = [[1.0 - 2 * (w >> bit & 1) for w in words] for bit in range(4)]
    s1, s2, s3, s4 = (torch.tensor(row, dtype=torch.float64).diag() for row in s)
    p = 1 << n.bit_length() - 1
    start, end = torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    start[:p, :p] = end[n - p :, n - p :] = hadamard(p)

    def half(s: Tensor, after: Tensor) -> Tensor:
        return end @ after @ start @ s if p < n else start @ s

    return half(s1, s2), half(s3, s4), sorted(range(n), key=words.__getitem__)


def hadamard(p: int) -> Tensor:
    """H, orthonormal."""
    rows = [[(-1) ** (i & j).bit_count() / math.sqrt(p) for j in range(p)] for i in range(p)]
    return torch.tensor(rows, dtype=torch.float64)


def flipped(seed: int, side: int, n: int, place: int) -> Tensor:
    """D, float64 `(n, n)`."""
    first = mix(mix(mix(mix(mix(seed) ^ side) ^ n)) ^ place)
    drawn = [mix((first + i * GAMMA) & MASK) for i in range(n // 64 + 1)]
    return (
        torch.tensor([1.0 - 2 * (drawn[i // 64] >> i % 64 & 1) for i in range(n)]).double().diag()
    )


def trellis(stream: bytes, steps: int, numbers: int) -> list[float]:
    """The values of all numbers."""

    def value(state: int, v: int) -> int:
        word = mix((64 * ((state + 613 * (v // 64)) % 1024) + v % 64) * GAMMA & MASK)
        return sum(word.to_bytes(8, "little")) - 1020

    found: list[float] = []
    for t in range(steps):
        start = t + 9 * (t // 8192)
        state = sum((stream[i // 8] >> i % 8 & 1) << i - start for i in range(start, start + 10))
        first = t * numbers // steps
        found += [value(state, e - first) for e in range(first, (t + 1) * numbers // steps)]
    return found


def mixed(
    levels: list[int], stream: bytes, steps: int, shape: tuple[int, int], seed: int, place: int
) -> Tensor:
    """What a trellis says of a matrix, float64 `(rows, columns)`."""
    rows, columns = shape
    if columns < 256 and rows > columns:
        return mixed(levels, stream, steps, (columns, rows), seed, place).T
    down, across = ceil(rows, 16), ceil(columns, 16)
    height = ceil(4096, 256 * across)
    tiles = [tile for tile in range(down) if levels[tile // height] > -64]
    values = iter(trellis(stream, steps, 256 * across * len(tiles)))
    w, _, order = halves(seed, 1, across)
    y = torch.zeros(16 * down, 16 * across, dtype=torch.float64)
    for tile in tiles:
        for i in range(across):
            for r in range(16):
                run = 16 * order[(i + r) % across]
                for column in range(run, run + 16):
                    y[16 * tile + r, column] = next(values) * 2 ** (levels[tile // height] / 8)
    x = y @ torch.kron(w, hadamard(16))
    return x[:rows, :columns] @ flipped(seed, 1, columns, place)


def ceil(count: int, of: int) -> int:
    """How many of so many hold all."""
    return -(-count // of)


def unpacked(file: Parts, names: Sequence[str]) -> Parts:
    """A file's parts, those that are packed among them, as `<tensor>/<part>`."""
    if "packed" not in file:
        return file
    pack, at = bytes(file["packed"].tolist()), 0

    def number() -> int:
        nonlocal at
        value = 0
        for shift in count(0, 7):
            at += 1
            value += pack[at - 1] % 128 << shift
            if pack[at - 1] < 128:
                break
        return value

    def text(size: int) -> str:
        nonlocal at
        at += size
        return pack[at - size : at].decode()

    of_parts = [text(number()) for _ in range(number())]
    tensors = ["", *sorted(names)]
    dtypes = {1: torch.float32, 2: torch.float16, 4: torch.int64, 8: torch.uint8}
    entries = []
    for _ in range(number()):
        tensor, part, dtype = tensors[number()], of_parts[number()], dtypes[number()]
        entries.append((f"{tensor}/{part}", dtype, [number() for _ in range(number())]))
    found = {key: part for key, part in file.items() if key != "packed"}
    for key, dtype, shape in entries:
        size = math.prod(shape) * dtype.itemsize
        found[key] = torch.frombuffer(bytearray(pack[at : at + size]), dtype=dtype).view(shape)
        at += size
    assert at == len(pack)
    return found


def sketch(settings: dict[str, Any], parts: Parts, shape: torch.Size) -> Tensor | None:
    """Σ g a bᵀ + g′ R_mᵀ X R_n, float64."""
    if "codes" not in parts:
        return None
    codes = bytes(parts["codes"].tolist())
    rows, columns = (1, shape.numel()) if len(shape) < 2 else (shape[0], shape[1:].numel())
    form, place, rank, kept, scale = struct.unpack_from("<BIHIf", codes)
    at, step, wanted = 15, 0.0, []
    if rank:
        [step] = struct.unpack_from("<f", codes, at)
        at += 4
    directions = [codes[at + 4 * i : at + 4 * i + 4] for i in range(rank)]
    for left, right, _, _ in directions:
        wanted += [(rows, scaled(left)), (columns, scaled(right))]
    if form == SIGNS:
        wanted += [(kept, gaps(kept, rows * columns)), (kept, Table([], 0, False, 1))]
    elif form in (INTEGERS, PLAIN):
        wanted += [(rows * columns, scaled(kept))]
    at, end = at + 4 * rank, len(codes)
    if form == TRELLIS:
        end -= ceil(kept + 9 * ceil(kept, 8192), 8)
        m, n = (columns, rows) if columns < 256 and rows > columns else (rows, columns)
        groups = ceil(ceil(m, 16), ceil(4096, 256 * ceil(n, 16)))
        wanted += [(groups, scaled(codes[at]))]
        at += 1
    symbols = decode(codes[at:end], wanted)
    of_directions, of_sketch = parts["gains"][place].double().tolist()
    delta = torch.zeros(rows, columns, dtype=torch.float64)
    for i, (_, _, grown, gain) in enumerate(directions):
        a, b = (torch.tensor(symbols[2 * i + side], dtype=torch.float64) for side in (0, 1))
        size = (step * 2 ** (grown / 16)) ** 2 * 2 ** (gain / 64 - 1)
        delta += of_directions * size * a.outer(b)
    entries = torch.zeros(rows * columns, dtype=torch.float64)
    if form == SIGNS:
        position = -1
        for gap, sign in zip(*symbols[-2:], strict=True):
            position += gap + 1
            entries[position] = 2 * sign - 1
    elif form in (INTEGERS, PLAIN):
        entries = torch.tensor(symbols[-1], dtype=torch.float64)
    elif form == TRELLIS:
        found = mixed(symbols[-1], codes[end:], kept, (rows, columns), settings["seed"], place)
        entries = found.reshape(-1)
    rest = scale * of_sketch * entries.view(rows, columns)
    if form in (SIGNS, INTEGERS):
        seed = settings["seed"]
        of_rows, of_columns = rotation(seed, 0, rows, place), rotation(seed, 1, columns, place)
        rest = of_rows.T @ rest @ of_columns
    return delta + rest


def scaled(byte: int) -> Table:
    """N(0, s²), or from 64 on Laplace's, at the integers."""
    s = 0.15 * (40 / 0.15) ** (byte % 64 / 63)

    def beyond(x: float) -> float:
        """P(symbol > x)."""
        if byte < 64:
            return math.erfc(x / s / math.sqrt(2)) / 2
        return math.exp(-x * math.sqrt(2) / s) / 2

    side = _rounded(lambda rest: beyond(rest + 0.5) - beyond(rest + 1.5)) or [1]
    escape = max(round(2 * beyond(len(side) + 0.5) * 2**16), 1)
    middle = 2**16 - escape - 2 * sum(side)
    return Table([escape, *reversed(side), middle, *side], len(side), True, 0)


def gaps(kept: int, total: int) -> Table:
    """Geometric, in steps of 2^low."""
    low = max((total // max(kept, 1)).bit_length() - 4, 0)
    q = (1 - max(kept, 1) / total) ** 2**low
    others = _rounded(lambda rest: (1 - q) * q ** (rest + 1))
    left = 2**16 - sum(others)
    escape = min(max(round(q ** (len(others) + 1) * 2**16), 1), left - 1)
    return Table([escape, left - escape, *others], len(others), False, low)


def _rounded(probability: Callable[[int], float]) -> list[int]:
    """In units of 2^-16, from the first on, up to where they become 0."""
    found: list[int] = []
    while value := round(probability(len(found)) * 2**16):
        found.append(value)
    return found
