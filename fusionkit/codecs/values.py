"""Values of a delta in the dtype that they are stored in: 32, 16, 8 or 4 bits each.

Floats are cast. Integers are symmetric: each group (or column) of values shares one scale, the
largest magnitude over 127 (int8) or 7 (int4), kept in bfloat16 (its range is float32's, and the
values are rounded against the scale as stored, so that its few digits cost no accuracy). The
error of an integer value is at most half its scale.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fusionkit.checkpoints.rounding import wider
from fusionkit.errors import CodecError, RangeError

ValueDtype = Literal["fp32", "fp16", "bf16", "int8", "int4"]
"""How values are stored; fp16 unless a codec says otherwise."""

GROUP = 128
"""Values that share one scale where they have no columns: 0.125 bits per value."""

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_LEVELS = {"int8": 127, "int4": 7}
_OVERFLOWS = 65520.0
"""The least magnitude that rounds to an infinity in fp16."""


def pack_values(values: Tensor, dtype: ValueDtype, part: str = "values") -> dict[str, Tensor]:
    """Store values in `dtype`.

    Args:
        values: float32. One axis: scales per group of 128. Two axes: scales per column.
        dtype: how to store them.
        part: name of the payload tensor; the scales of integers go beside it, as `<part>.scale`.

    Returns:
        the payload tensors, by name; int4 has two values a byte along the first axis.

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
    if dtype not in _LEVELS:
        raise CodecError(f"unknown dtype '{dtype}'; expected {', '.join([*_FLOATS, *_LEVELS])}")
    levels = _LEVELS[dtype]
    grouped = _grouped(values) if values.ndim == 1 else values
    largest = grouped.abs().amax(0) if grouped.numel() else grouped.new_zeros(grouped.shape[1])
    # Rounding the scale up keeps the largest value within the levels.
    scale = (largest / levels * (1 + 2**-7)).to(torch.bfloat16)
    safe = torch.where(scale > 0, scale, 1).to(torch.float32)
    codes = torch.round(grouped / safe).clamp_(-levels, levels).to(torch.int8)
    if values.ndim == 1:
        codes = codes.T.reshape(-1)[: values.numel()]
    return {part: _nibbles(codes) if dtype == "int4" else codes, f"{part}.scale": scale}


def unpack_values(
    parts: Mapping[str, Tensor], count: int, dtype: ValueDtype, part: str = "values"
) -> Tensor:
    """Read values back as float32.

    Args:
        parts: payload tensors as `pack_values` named them.
        count: length of the first axis (int4 bytes don't record it).
        dtype: how they were stored.
        part: name of the payload tensor.

    Returns:
        float32, `(count,)` or `(count, columns)`; never the payload's own memory.
    """
    stored = parts[part]
    if dtype in _FLOATS:
        return stored.to(torch.float32, copy=True)
    codes = _from_nibbles(stored, count) if dtype == "int4" else stored
    scale = parts[f"{part}.scale"].to(torch.float32)
    if codes.ndim == 1:
        return codes * scale.repeat_interleave(GROUP)[:count]
    return codes * scale


def stored_bytes(shape: tuple[int, ...], dtype: ValueDtype) -> int:
    """Bytes that `pack_values` makes of values of this shape, scales included."""
    rows, columns = shape[0], 1 if len(shape) == 1 else shape[1]
    if dtype in _FLOATS:
        return rows * columns * _FLOATS[dtype].itemsize
    scales = -(-rows // GROUP) if len(shape) == 1 else columns
    codes = -(-rows // 2) if dtype == "int4" else rows
    return codes * columns + 2 * scales


def _grouped(values: Tensor) -> Tensor:
    """`(count,)` → `(GROUP, groups)`, zero-padded: groups become columns."""
    padded = torch.nn.functional.pad(values, (0, -values.numel() % GROUP))
    return padded.view(-1, GROUP).T


def _nibbles(codes: Tensor) -> Tensor:
    offset = (codes + 8).to(torch.uint8)
    if offset.shape[0] % 2:
        offset = torch.cat([offset, offset.new_full((1, *offset.shape[1:]), 8)])
    return offset[0::2] | (offset[1::2] << 4)


def _from_nibbles(packed: Tensor, count: int) -> Tensor:
    codes = torch.stack([packed & 0xF, packed >> 4], 1).flatten(0, 1)[:count]
    return codes.to(torch.int8) - 8
