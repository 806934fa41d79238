"""Fine-tuned checkpoints back bit for bit: differences against the base, as compressed bytes."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import zstandard
from torch import Tensor

from fusionkit import Parts, RestoringCodec
from fusionkit.errors import CodecError

_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _INTEGERS}


@dataclass(frozen=True)
class Lossless(RestoringCodec):
    """Keep the difference of the bits of fine-tuned and base, read as integers, byte by byte.

    A fine-tuned weight is near the base's, and so are their bits read as integers: the upper bytes
    of the difference are nearly always the same. The k-th bytes of all entries of a tensor are a
    plane, compressed by itself with Zstandard. Lower bytes are as good as random: the gain is in
    the upper ones, larger the less the fine-tuning moved. Where base and fine-tuned differ in
    dtype, the base is rounded to the fine-tuned's first.

    Args:
        level: Zstandard's, 1 (fast) to 22; decoding is as fast for any.

    Raises:
        CodecError: the level is outside 1 to 22.
    """

    id: ClassVar[str] = "lossless"
    level: int = 1

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
        difference += _centre(size)
        planes = np.ascontiguousarray(difference.numpy().view(np.uint8).reshape(-1, size).T)
        compressor = zstandard.ZstdCompressor(level=self.level)
        name = str(tuned.dtype).removeprefix("torch.")
        return {
            f"{name}.{place}": torch.frombuffer(
                bytearray(compressor.compress(plane.data)), dtype=torch.uint8
            )
            for place, plane in enumerate(planes)
        }

    def restore(self, parts: Parts, base: Tensor) -> Tensor:
        """The fine-tuned tensor, in its own dtype."""
        name = next(iter(parts)).partition(".")[0]
        dtype, count = _DTYPES[name], base.numel()
        planes = np.empty((count, dtype.itemsize), np.uint8)
        decompressor = zstandard.ZstdDecompressor()
        for place in range(dtype.itemsize):
            stored = parts[f"{name}.{place}"].cpu().numpy()
            plane = decompressor.decompress(stored.data, max_output_size=count)
            planes[:, place] = np.frombuffer(plane, np.uint8)
        bits = torch.from_numpy(planes.reshape(-1)).view(_INTEGERS[dtype]).to(base.device)
        bits -= _centre(dtype.itemsize)
        bits += _bits(base.to(dtype))
        return bits.view(dtype).view(base.shape)


def _bits(tensor: Tensor) -> Tensor:
    """The bits as integers, flat."""
    return tensor.reshape(-1).view(_INTEGERS[tensor.dtype])


def _centre(size: int) -> int:
    """0x80 in every byte but the highest: small differences of either sign share upper bytes."""
    return int.from_bytes(b"\x80" * (size - 1), "little") if size > 1 else 0
