"""Values of a delta in the dtype that they are stored in: 32, 16, 8, 4, 3 or 2 bits each.

Floats are cast. Integers are symmetric: each group (or column) of values shares one scale, kept in
bfloat16 (its range is float32's, and the values are rounded against the scale as stored, so that
its few digits cost no accuracy). A value is its integer times the scale:

- int8, int4: −127 to 127, −7 to 7. The scale is the largest magnitude over 127 or 7, so that the
  error of a value is at most half the scale, and zeros stay zeros.
- int3, int2: ±½, ±1½, … to ±3½ or ±1½; all codes are used, and none is zero (but a group of zeros
  alone comes back as such). Few levels are better spent on the many values than on the largest:
  the scale is, of some, the one of the least squared error, and what is larger is cut. In all, the
  error is no larger than if every value were off by a 7th (int3) or a 3rd (int2) of the largest.

So much, half a step, is what other codecs mean by the rounding of their dtype: of floats 2⁻¹¹ of a
value (fp16), 2⁻⁸ (bf16), nothing (fp32). Beside it values of less than 1e-7 in fp16, and of less
than 1e-36 in integers, may be lost.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor

from fusionkit.checkpoints.rounding import wider
from fusionkit.codecs.packing import pack_integers, unpack_integers
from fusionkit.errors import CodecError, RangeError

ValueDtype = Literal["fp32", "fp16", "bf16", "int8", "int4", "int3", "int2"]
"""How values are stored; fp16 unless a codec says otherwise."""

GROUP = 128
"""Values that share one scale where they have no columns: 0.125 bits per value."""

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
_HALVES = ("int3", "int2")
"""Their values are odd multiples of half a scale."""
_TOPS = [2 ** (-place / 6) for place in range(19)]
"""Where the highest level may lie, as shares of the largest magnitude."""
_BLOCK = 1 << 18
"""Entries whose scales are looked for at once: few enough to stay in cache."""
_OVERFLOWS = 65520.0
"""The least magnitude that rounds to an infinity in fp16."""


def pack_values(values: Tensor, dtype: ValueDtype, part: str = "values") -> dict[str, Tensor]:
    """Store values in `dtype`.

    Args:
        values: float32. One axis: scales per group of 128. Two axes: scales per column.
        dtype: how to store them.
        part: name of the payload tensor; the scales of integers go beside it, as `<part>.scale`.

    Returns:
        the payload tensors, by name; integers of less than 8 bits are packed along the first axis.

    Raises:
        RangeError: a finite value is too large for fp16.
        CodecError: the dtype is unknown.
    """
    if dtype in _FLOATS:
        if dtype == "fp16" and values.numel():
            low, high = torch.aminmax(values)  # what is stored would be slower to look at
            magnitude = max(-float(low), float(high))
            if not magnitude < _OVERFLOWS:
                raise RangeError(
                    f"a value of magnitude {magnitude:.3g} does not fit into fp16; "
                    f"store the values in {wider(magnitude)}"
                )
        return {part: values.to(_FLOATS[dtype])}
    if dtype not in _BITS:
        raise CodecError(f"unknown dtype '{dtype}'; expected {', '.join([*_FLOATS, *_BITS])}")
    grouped = _grouped(values) if values.ndim == 1 else values
    padding = grouped.numel() - values.numel()
    codes, scale = (_halves if dtype in _HALVES else _whole)(grouped, _BITS[dtype], padding)
    if values.ndim == 1:
        codes = codes.T.reshape(-1)[: values.numel()]
    if dtype != "int8":
        offset = 1 << (_BITS[dtype] - 1)
        codes = pack_integers((codes + offset).to(torch.uint8), _BITS[dtype], fill=offset)
    return {part: codes, f"{part}.scale": scale}


def unpack_values(
    parts: Mapping[str, Tensor], count: int, dtype: ValueDtype, part: str = "values"
) -> Tensor:
    """Read values back as float32.

    Args:
        parts: payload tensors as `pack_values` named them.
        count: length of the first axis (packed bytes don't record it).
        dtype: how they were stored.
        part: name of the payload tensor.

    Returns:
        float32, `(count,)` or `(count, columns)`; never the payload's own memory.
    """
    stored = parts[part]
    if dtype in _FLOATS:
        return stored.to(torch.float32, copy=True)
    codes = stored
    if dtype != "int8":
        offset = 1 << (_BITS[dtype] - 1)
        codes = unpack_integers(stored, count, _BITS[dtype]).to(torch.int8) - offset
    if dtype in _HALVES:
        codes = codes + 0.5
    scale = parts[f"{part}.scale"].to(torch.float32)
    if codes.ndim == 1:
        return codes * scale.repeat_interleave(GROUP)[:count]
    return codes * scale


def held_values(
    parts: Mapping[str, Tensor], count: int, dtype: ValueDtype, part: str = "values"
) -> Tensor:
    """Values to be kept in memory: floats as they are stored, integers as float32.

    Arguments as for `unpack_values`.
    """
    return parts[part] if dtype in _FLOATS else unpack_values(parts, count, dtype, part)


def stored_bytes(shape: tuple[int, ...], dtype: ValueDtype) -> int:
    """Bytes that `pack_values` makes of values of this shape, scales included."""
    rows, columns = shape[0], 1 if len(shape) == 1 else shape[1]
    if dtype in _FLOATS:
        return rows * columns * _FLOATS[dtype].itemsize
    scales = -(-rows // GROUP) if len(shape) == 1 else columns
    return -(-rows * _BITS[dtype] // 8) * columns + 2 * scales


def values_bytes(shapes: Mapping[str, Sequence[int]], dtype: ValueDtype) -> int:
    """Bytes that `pack_values` makes of all values of tensors, by name, each tensor by itself."""
    return sum(stored_bytes((prod(shape),), dtype) for shape in shapes.values())


def _grouped(values: Tensor) -> Tensor:
    """`(count,)` → `(GROUP, groups)`, zero-padded: groups become columns."""
    padded = torch.nn.functional.pad(values, (0, -values.numel() % GROUP))
    return padded.view(-1, GROUP).T


def _whole(grouped: Tensor, bits: int, padding: int) -> tuple[Tensor, Tensor]:
    """Integers about zero, int8, and the scale of each column; nothing is cut."""
    levels = (1 << (bits - 1)) - 1
    # Rounding the scale up keeps the largest value within the levels.
    scale = (_largest(grouped) / levels * (1 + 2**-7)).to(torch.bfloat16)
    codes = torch.round(grouped / _divisor(scale)).clamp_(-levels, levels)
    return codes.to(torch.int8), scale


def _halves(grouped: Tensor, bits: int, padding: int) -> tuple[Tensor, Tensor]:
    """Integers c for values of c + ½ scales, int8, and the scale of each column."""
    half = 1 << (bits - 1)
    largest = _largest(grouped)
    steps = torch.empty_like(largest)
    width = max(_BLOCK // max(len(grouped), 1), 1)
    for start in range(0, grouped.shape[1], width):
        place = slice(start, start + width)
        last = start + width >= grouped.shape[1]
        relative = grouped[:, place] / _divisor(largest[place])
        steps[place] = _best_steps(relative, half, padding if last else 0)
    scale = (steps * largest).to(torch.bfloat16)
    codes = torch.floor(grouped / _divisor(scale)).clamp_(-half, half - 1)
    return codes.to(torch.int8), scale


def _best_steps(relative: Tensor, half: int, padding: int) -> Tensor:
    """Of some, the step between levels that has the least squared error, for each column.

    Args:
        relative: the columns, each over its largest magnitude.
        half: half of the number of levels.
        padding: how many entries at the end of the last column don't count.
    """
    best = relative.new_ones(relative.shape[1])
    least = torch.full_like(best, torch.inf)
    level = torch.empty_like(relative)
    for top in _TOPS:
        step = top / (half - 0.5)
        torch.mul(relative, 1 / step, out=level).floor_().clamp_(-half, half - 1).add_(0.5)
        error = level.mul_(step).sub_(relative).square_()
        if padding:
            error[-padding:, -1] = 0
        total = error.sum(0)
        best.masked_fill_(total < least, step)
        torch.minimum(total, least, out=least)
    return best


def _largest(grouped: Tensor) -> Tensor:
    """The largest magnitude of each column."""
    return grouped.abs().amax(0) if grouped.numel() else grouped.new_zeros(grouped.shape[1])


def _divisor(scale: Tensor) -> Tensor:
    """The scales in float32, 1 where they are 0."""
    return torch.where(scale > 0, scale, 1).to(torch.float32)
