"""Bits, small integers and sparse positions as bytes: pure functions, vectorised, on any device.

Bit order is little-endian throughout: entry `i` of a mask is bit `i % 8` of byte `i // 8`, and
integer `i` of `b` bits is bits `b i` to `b i + b - 1`.

Sparse positions are Golomb-Rice coded. The gaps between kept positions are split into a quotient
(unary, terminated by a one) and a remainder of `k` bits; the quotients make one stream, and each
bit of the remainders another, so that decoding is a handful of vectorised steps. For entries kept
independently with probability d the code stays within 5% of the mask's entropy H(d) (Golomb
1966; Rice 1979). Layout of the bytes: `k` (bit 7 set: the complement is coded), the number of
coded positions as 8 bytes little-endian, the unary stream, and the k streams of the remainders,
lowest bit first, as one; both padded to whole bytes.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionkit.codecs import kernels
from fusionkit.codecs.layout import PartSpec
from fusionkit.task_vectors.kernels import places

_COMPLEMENT = 0x80
_HEADER = 9
_WORDS = {1: torch.uint8, 3: torch.int32, 5: torch.int64, 7: torch.int64}
"""Bytes of a word → the dtype that it is put together in."""


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
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise ValueError(f"expected bytes of bits, got {PartSpec.of(packed)}")
    if packed.numel() * 8 < count:
        raise ValueError(f"expected at least {count} bits, got {packed.numel() * 8}")
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little"))
    return _unpack_on_device(packed, count)


def bits_spec(count: int) -> PartSpec:
    """What `pack_bits` makes of so many entries."""
    return PartSpec(torch.uint8, (-(-count // 8),))


def pack_integers(integers: Tensor, bits: int, fill: int = 0) -> Tensor:
    """Pack small integers along the first axis; the other axes stay as they are.

    Args:
        integers: uint8 `(count, …)`, each below 2^bits.
        bits: 1 to 8, of each integer.
        fill: the integer that fills up the last byte.

    Returns:
        uint8 `(ceil(count · bits / 8), …)` on the same device.
    """
    count, size = len(integers), _word(bits)
    per = 8 * size // bits
    filling = integers.new_full((-count % per, *integers.shape[1:]), fill)
    padded = torch.cat([integers, filling])
    words = padded.new_zeros(len(padded) // per, *integers.shape[1:], dtype=_WORDS[size])
    for place in range(per):
        words |= padded[place::per].to(words.dtype) << (bits * place)
    if size == 1:
        return words
    packed = torch.stack([(words >> (8 * k) & 0xFF).to(torch.uint8) for k in range(size)], 1)
    return packed.flatten(0, 1)[: -(-count * bits // 8)]


def unpack_integers(packed: Tensor, count: int, bits: int) -> Tensor:
    """Unpack `count` integers along the first axis.

    Args:
        packed: uint8 `(ceil(count · bits / 8), …)` or longer.
        count: number of integers; packed bytes don't record it.
        bits: 1 to 8, of each integer.

    Returns:
        uint8 `(count, …)`, on the same device.

    Raises:
        ValueError: fewer than `count` integers are there.
    """
    if packed.dtype != torch.uint8 or not packed.ndim:
        raise ValueError(f"expected bytes of integers, got {PartSpec.of(packed)}")
    if 8 * len(packed) < count * bits:
        raise ValueError(
            f"expected at least {-(-count * bits // 8)} bytes of {bits}-bit integers, "
            f"got {len(packed)}"
        )
    size, words = _word(bits), packed
    per = 8 * size // bits
    if size > 1:
        padded = torch.cat([packed, packed.new_zeros(-len(packed) % size, *packed.shape[1:])])
        words = padded[0::size].to(_WORDS[size])
        for k in range(1, size):
            words |= padded[k::size].to(words.dtype) << (8 * k)
    mask = (1 << bits) - 1
    spread = [(words >> (bits * place) & mask).to(torch.uint8) for place in range(per)]
    return torch.stack(spread, 1).flatten(0, 1)[:count]


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
    positions, count = positions.contiguous(), positions.numel()
    whole = int(positions[-1]) + 1 - count if count else 0  # the gaps' sum
    near = (whole // count).bit_length() if count else 0
    streams = _rice if positions.device.type == "cpu" else _rice_on_device
    k, unary, remainders = streams(positions, max(near - 2, 0))
    header = bytes([k | (_COMPLEMENT if complement else 0)]) + count.to_bytes(8, "little")
    head = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(positions.device)
    return torch.cat([head, unary, remainders])


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
    if coded.dtype != torch.uint8 or coded.ndim != 1:
        raise ValueError(f"expected bytes of coded positions, got {PartSpec.of(coded)}")
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


def _word(bits: int) -> int:
    """The fewest bytes that whole integers fill."""
    return math.lcm(bits, 8) // 8


def _rice(positions: Tensor, least: int) -> tuple[int, Tensor, Tensor]:
    """The `k` from `least` on with the shortest code, the quotients' stream, the remainders'."""
    count = positions.numel()
    if not count:
        return 0, *positions.new_empty(2, 0, dtype=torch.uint8)
    sums = kernels.quotients(positions.numpy(), least).tolist()
    k, length = _shortest(sums, count, least)
    unary, remainders = (np.zeros(bits // 64 + 2, "<u8") for bits in (length, count * k))
    kernels.rice(positions.numpy(), k, unary, remainders)
    return k, _first_bits(unary, length), _first_bits(remainders, count * k)


def _first_bits(words: NDArray[np.uint64], count: int) -> Tensor:
    """The bytes that hold the first bits."""
    return torch.from_numpy(words.view(np.uint8)[: -(-count // 8)])


def _rice_on_device(positions: Tensor, least: int) -> tuple[int, Tensor, Tensor]:
    """The same in PyTorch."""
    gaps = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
    if not len(gaps):
        return 0, *gaps.new_empty(2, 0, dtype=torch.uint8)
    k, length = _shortest([int((gaps >> (least + k)).sum()) for k in range(4)], len(gaps), least)
    unary = torch.zeros(length, dtype=torch.uint8, device=gaps.device)
    unary[torch.cumsum((gaps >> k).add_(1), 0) - 1] = 1
    bits = [((gaps >> bit) & 1).to(torch.uint8) for bit in range(k)]
    return k, pack_bits(unary), pack_bits(torch.cat([*bits, unary[:0]]))


def _shortest(sums: list[int], count: int, least: int) -> tuple[int, int]:
    """The `k` with the shortest code, and the length of its quotients' stream.

    Args:
        sums: the sums of the quotients, for each `k` from `least` on.
        count: how many gaps there are.
        least: the least `k`.
    """
    lengths = [total + count for total in sums]
    best = min(range(len(sums)), key=lambda more: (least + more) * count + lengths[more])
    return least + best, lengths[best]


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
