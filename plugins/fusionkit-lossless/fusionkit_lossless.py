"""Fine-tuned checkpoints back bit for bit: differences against the base, as compressed bytes."""

import threading
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import zstandard
from torch import Tensor

from fusionkit import Parts, RestoringCodec
from fusionkit.codecs.layout import Layout, PartSpec
from fusionkit.errors import CodecError

_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _INTEGERS}


_CARRY = 0x0080808080808080
_SIGNED = np.array([0x80] * 7 + [0], np.uint8)
"""Bytes as digits of −128 to 127: with 0x80 added to all but the highest, carries are as they must
be; with their highest bit flipped the lower bytes are then those digits. Small differences of
either sign have the same upper digits."""
_RAW = ".raw"
_WORTH = 0.95
"""A plane that would be longer than so much of itself is kept as it is: that is read at once."""


@dataclass(frozen=True)
class Lossless(RestoringCodec):
    """Keep the difference of the bits of fine-tuned and base, read as integers, byte by byte.

    A fine-tuned weight is near the base's, and so are their bits read as integers: the upper bytes
    of the difference are nearly always the same. The k-th bytes of all entries of a tensor are a
    plane, compressed by itself with Zstandard. Lower bytes are as good as random: the gain is in
    the upper ones, larger the less the fine-tuning moved. Where base and fine-tuned differ in
    dtype, the base is rounded to the fine-tuned's first.

    Args:
        level: Zstandard's, 1 (fast to encode) to 22; 9 is also fast to decode.

    Raises:
        CodecError: the level is outside 1 to 22.
    """

    id: ClassVar[str] = "lossless"
    level: int = 9

    def __post_init__(self) -> None:
        if not 1 <= self.level <= zstandard.MAX_COMPRESSION_LEVEL:
            raise CodecError(
                f"expected Lossless's level in 1 to {zstandard.MAX_COMPRESSION_LEVEL}, "
                f"got {self.level}"
            )

    def encode_restorable(self, tuned: Tensor, base: Tensor) -> Parts:
        """One part per byte of the dtype, `float16.0` the lowest; none where the bits are equal.

        Raises:
            CodecError: the dtype is none of fp16, bf16, fp32, fp64.
        """
        if tuned.dtype not in _INTEGERS:
            raise CodecError(f"Lossless takes fp16, bf16, fp32 and fp64, not {tuned.dtype}")
        difference = _bits(tuned) - _bits(base.to(tuned.dtype))
        if tuned.dtype == base.dtype and not difference.any():
            return {}
        size = tuned.dtype.itemsize
        difference += _CARRY >> (64 - 8 * size)
        planes = difference.numpy().view(np.uint8).reshape(-1, size).T ^ _SIGNED[-size:, None]
        compressor = zstandard.ZstdCompressor(level=self.level)
        dtype = str(tuned.dtype).removeprefix("torch.")
        parts = {}
        for place, plane in enumerate(planes):
            packed = compressor.compress(np.ascontiguousarray(plane).data)
            if len(packed) < _WORTH * len(plane):
                parts[f"{dtype}.{place}"] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
            else:
                parts[f"{dtype}.{place}{_RAW}"] = torch.from_numpy(plane.copy())
        return parts

    def layout(self, shape: torch.Size) -> Layout:
        """Planes of bytes: compressed, or one a entry."""
        planes = [f"{name}.{k}" for name, dtype in _DTYPES.items() for k in range(dtype.itemsize)]
        packed = PartSpec(torch.uint8, (None,))
        raw = PartSpec(torch.uint8, (shape.numel(),))
        return {**dict.fromkeys(planes, packed), **{plane + _RAW: raw for plane in planes}}

    def restore(self, parts: Parts, base: Tensor) -> Tensor:
        """The fine-tuned tensor, in its own dtype."""
        name = next(iter(parts)).partition(".")[0]
        dtype, count = _DTYPES[name], base.numel()
        rounded = base.to(dtype)
        bits = _bits(rounded)
        own = bits if rounded is not base else torch.empty_like(bits)
        wide = _scratch(own.dtype, count)
        for k in range(dtype.itemsize):
            wide.copy_(_digits(parts, f"{name}.{k}", count))
            bits = torch.add(bits, wide.to(base.device), alpha=1 << 8 * k, out=own)
        return bits.view(dtype).view(base.shape)


class _Scratch(threading.local):
    """Memory that a thread uses for one tensor after another: fresh pages cost as much as decoding.

    Attributes:
        decompressor: Zstandard's.
        buffers: dtype → the longest that was needed.
    """

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()
        self.buffers: dict[torch.dtype, Tensor] = {}


_SCRATCH = _Scratch()


def _scratch(dtype: torch.dtype, count: int) -> Tensor:
    buffer = _SCRATCH.buffers.get(dtype)
    if buffer is None or buffer.numel() < count:
        buffer = _SCRATCH.buffers[dtype] = torch.empty(count, dtype=dtype)
    return buffer[:count]


def _digits(parts: Parts, name: str, count: int) -> Tensor:
    """One digit of every entry: int8 `(count,)` on the CPU, valid until the next call.

    Raises:
        ValueError: there are fewer, or they are no Zstandard frame.
    """
    if (raw := parts.get(name + _RAW)) is not None:
        plane = raw.cpu()
        read = len(plane)
    else:
        packed = parts[name].cpu().numpy()
        plane = _scratch(torch.uint8, count)
        reader = _SCRATCH.decompressor.stream_reader(packed.data)
        try:
            read = reader.readinto(plane.numpy().data)
        except zstandard.ZstdError as error:
            raise ValueError(f"'{name}' is no Zstandard frame: {error}") from error
    if read != count:
        raise ValueError(f"expected {count} bytes in '{name}', found {read}")
    return plane.view(torch.int8)


def _bits(tensor: Tensor) -> Tensor:
    """The bits as integers, flat."""
    return tensor.reshape(-1).view(_INTEGERS[tensor.dtype])
