"""Bits and sparse positions as bytes: pure functions, vectorised, on any device.

Bit order is little-endian throughout: entry `i` of a mask is bit `i % 8` of byte `i // 8`.

Sparse positions are Golomb-Rice coded. The gaps between kept positions are split into a quotient
(unary, terminated by a one) and a remainder of `k` bits; the quotients make one stream, and each
bit of the remainders another, so that decoding is a handful of vectorised steps. For entries kept
independently with probability d the code stays within 5% of the mask's entropy H(d) (Golomb
1966; Rice 1979). Layout of the bytes: `k` (bit 7 set: the complement is coded), the number of
coded positions as 8 bytes little-endian, the unary stream, and the k streams of the remainders,
lowest bit first, as one; both padded to whole bytes.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_COMPLEMENT = 0x80
_HEADER = 9
_PIECE = 1 << 18


def above(values: Tensor, limit: float, out: Tensor | None = None) -> Tensor:
    """Where values are larger than a limit: bool, of the same shape; into `out`, if given."""
    if values.device.type == "cpu":  # NumPy is several times faster
        into = None if out is None else out.numpy()
        found: Any = np.greater(values.numpy(), np.float32(limit), out=into)
        return torch.from_numpy(found) if out is None else out
    return torch.gt(values, limit, out=out)


def kth_largest(values: Tensor, k: int) -> float:
    """The k-th largest, from 1 on, of float32 `(n,)`."""
    if values.device.type == "cpu":  # NumPy is several times faster
        return float(np.partition(values.numpy(), -k)[-k])
    return float(torch.kthvalue(values, len(values) - k + 1).values)


def places(mask: Tensor) -> Tensor:
    """Flat positions at which a mask is set: int64, increasing."""
    if mask.device.type == "cpu":  # NumPy is several times faster on booleans
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero().reshape(-1)


def count_set(mask: Tensor) -> int:
    """At how many places a mask is set."""
    if mask.device.type == "cpu":  # NumPy is several times faster on booleans
        return int(np.count_nonzero(mask.numpy()))
    return int(torch.count_nonzero(mask))


def pack_bits(bits: Tensor) -> Tensor:
    """Pack a mask into one bit per entry.

    Args:
        bits: bool (or 0/1 integers), any shape; read in row-major order.

    Returns:
        uint8 `(ceil(numel / 8),)` on the same device; the padding bits are 0.
    """
    flat = bits.reshape(-1)
    if flat.device.type == "cpu":
        small = flat if flat.dtype in (torch.bool, torch.uint8) else flat.to(torch.bool)
        array = small.numpy()
        return torch.from_numpy(np.packbits(array, bitorder="little"))
    return _pack_on_device(flat)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Unpack `count` bits.

    Args:
        packed: uint8 `(ceil(count / 8),)` or longer.
        count: number of entries; packed bytes don't record it.

    Returns:
        uint8 `(count,)` of 0 and 1, on the same device.

    Raises:
        ValueError: fewer than `count` bits are there.
    """
    if packed.numel() * 8 < count:
        raise ValueError(f"expected at least {count} bits, got {packed.numel() * 8}")
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little"))
    return _unpack_on_device(packed, count)


def encode_positions(positions: Tensor, total: int) -> Tensor:
    """Code sorted positions close to their entropy.

    Args:
        positions: int32 or int64 `(count,)`, strictly increasing, each in `[0, total)`.
        total: number of entries that the positions point into.

    Returns:
        uint8 `(bytes,)`: see the module's docstring.
    """
    complement = 2 * positions.numel() > total
    if complement:  # the rarer kind is always the cheaper one to code
        positions = _others(positions, total)
    count = positions.numel()
    gaps = _gaps(positions, total)
    k, quotients = _rice_parameter(gaps, int(positions[-1]) + 1 - count if count else 0)
    unary = torch.zeros(quotients + count, dtype=torch.uint8, device=gaps.device)
    remainders = torch.empty(k, count, dtype=torch.uint8, device=gaps.device)
    start = 0
    for place, piece in _split(gaps):
        ends = torch.cumsum((piece >> k).add_(1), 0).add_(start - 1)
        unary.index_fill_(0, ends, 1)
        start = int(ends[-1]) + 1
        for bit in range(k):  # of one byte at a time
            if bit % 8 == 0:
                byte = (piece >> bit).to(torch.uint8)
            torch.bitwise_and(byte >> bit % 8, 1, out=remainders[bit, place])
    header = bytes([k | (_COMPLEMENT if complement else 0)]) + count.to_bytes(8, "little")
    head = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(gaps.device)
    return torch.cat([head, pack_bits(unary), pack_bits(remainders)])


def decode_positions(coded: Tensor, total: int) -> Tensor:
    """Recover the positions that `encode_positions` coded.

    Args:
        coded: uint8 `(bytes,)`.
        total: number of entries that the positions point into.

    Returns:
        int64 `(count,)`, strictly increasing, on the same device.

    Raises:
        ValueError: the bytes are not such a code, or point outside `[0, total)`.
    """
    if coded.numel() < _HEADER:
        raise ValueError(f"expected at least {_HEADER} bytes of coded positions")
    header = bytes(coded[:_HEADER].tolist())
    k, count = header[0] & ~_COMPLEMENT, int.from_bytes(header[1:], "little")
    tail = (count * k + 7) // 8
    unary_bytes = coded.numel() - _HEADER - tail
    if k > total.bit_length() or unary_bytes < 0 or count > total:
        raise ValueError("the coded positions are malformed")
    stream = coded[_HEADER : _HEADER + unary_bytes]
    ends = places(unpack_bits(stream, unary_bytes * 8).view(torch.bool))
    if ends.numel() != count:
        raise ValueError(f"expected {count} coded positions, found {ends.numel()}")
    if count and (int(ends[-1]) + 1 - count) << k >= total:  # before it can overflow an int64
        raise ValueError(f"a coded position lies outside the {total} entries")
    gaps = torch.diff(ends, prepend=ends.new_tensor([-1])) - 1
    gaps <<= k
    bits = unpack_bits(coded[_HEADER + unary_bytes :], count * k).view(k, count)
    for place in range(k):
        gaps |= bits[place].to(torch.int64) << place
    positions = torch.cumsum(gaps + 1, 0) - 1
    if count and int(positions[-1]) >= total:
        raise ValueError(f"a coded position lies outside the {total} entries")
    return _others(positions, total) if header[0] & _COMPLEMENT else positions


def _gaps(positions: Tensor, total: int) -> Tensor:
    """How many entries lie between neighbouring positions: int32 where they fit, else int64."""
    narrow = torch.int32 if total < 1 << 31 else torch.int64
    gaps = torch.empty(positions.numel(), dtype=narrow, device=positions.device)
    for place, piece in _split(positions):
        gaps[place][1:] = piece[1:] - piece[:-1] - 1
        gaps[place.start] = piece[0] - (positions[place.start - 1] if place.start else -1) - 1
    return gaps


def _rice_parameter(gaps: Tensor, whole: int) -> tuple[int, int]:
    """The `k` with the shortest code, next to log2 of the mean gap; and the quotients' sum.

    Args:
        gaps: integers `(count,)`.
        whole: their sum.
    """
    count = gaps.numel()
    if not count:
        return 0, 0
    near = (whole // count).bit_length()
    tried = range(max(0, near - 2), near + 2)
    sums = dict.fromkeys(tried, 0)
    for _, piece in _split(gaps):
        for k in tried:
            sums[k] += _sum(piece >> k)
    k = min(tried, key=lambda k: k * count + sums[k])
    return k, sums[k]


def _split(values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Pieces that stay in cache, on the CPU."""
    size = _PIECE if values.device.type == "cpu" else max(values.numel(), 1)
    for start in range(0, values.numel(), size):
        place = slice(start, min(start + size, values.numel()))
        yield place, values[place]


def _sum(integers: Tensor) -> int:
    if integers.device.type == "cpu":  # NumPy is several times faster on int32
        return int(np.sum(integers.numpy(), dtype=np.int64))
    return int(integers.sum())


def _others(positions: Tensor, total: int) -> Tensor:
    left = torch.ones(total, dtype=torch.uint8, device=positions.device)
    left[positions] = 0
    return places(left.view(torch.bool))


def _pack_on_device(flat: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8))
    return (padded.view(-1, 8) << _shifts(flat.device)).sum(-1, dtype=torch.uint8)


def _unpack_on_device(packed: Tensor, count: int) -> Tensor:
    bits = (packed[: (count + 7) // 8, None] >> _shifts(packed.device)) & 1
    return bits.reshape(-1)[:count]


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
