"""Quantised weights, format by format: what tensors each is stored as, and what values they mean.

All arithmetic is in float32; whoever reads rounds once, to the dtype that the model had.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of float4 (e2m1) by code."""

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word AWQ's kernel takes each of 8 neighbouring columns from."""

_BNB_127 = 7.874015748031496e-3
"""1 / 127, by which bitsandbytes multiplies."""


@dataclass(frozen=True)
class QuantizedWeight(ABC):
    """One weight as a quantiser stores it.

    Attributes:
        name: its name in the unquantised model.
        method: how messages call the way it is quantised: `GPTQ, 4 bits`.
        parts: what it is stored as: part → tensor's name; the first is what messages show.
        shape: its shape in the unquantised model.
        dtype: that of its scales.
        dropped: names of tensors beside it that say how its layer's activations are quantised.
    """

    name: str
    method: str
    parts: Mapping[str, str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    dropped: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def tensor(self) -> str:
        """The tensor that messages show."""
        return next(iter(self.parts.values()))

    @abstractmethod
    def values(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Its values, float32 `(*shape)`.

        Args:
            parts: part → its tensor, as stored.
        """


@dataclass(frozen=True)
class Unreadable(QuantizedWeight):
    """One whose values can't be computed here.

    Attributes:
        reason: why not.
        mend: what to do instead.
    """

    reason: str
    mend: str

    def values(self, parts: Mapping[str, Tensor]) -> Tensor:
        """None: whoever asks was told before."""
        raise NotImplementedError(self.reason)


@dataclass(frozen=True)
class Scaled(QuantizedWeight):
    """`(q − zero) · scale`: float8 or int8 values, a scale for each tensor, row, group or block.

    FP8 with scales (DeepSeek's `weight_scale_inv`, which is the scale all the same; FBGEMM's,
    compressed-tensors' `weight_scale`), and the integers of compressed-tensors. Scales in uint8
    are exponents (E8M0), 2^(s − 127).

    Attributes:
        blocks: entries under one scale, along each axis.
    """

    blocks: tuple[int, ...]

    def values(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See above."""
        values = parts["weight"].to(torch.float32)
        if "zero" in parts:
            values -= self._spread(parts["zero"].to(torch.float32), parts)
        return values.mul_(self._spread(scales(parts["scale"]), parts))

    def _spread(self, per_block: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return spread(per_block, self.shape, self.blocks, parts.get("groups"))


@dataclass(frozen=True)
class PackedIntegers(Scaled):
    """Integers of a few bits, packed into int32 along the rows (compressed-tensors).

    Attributes:
        bits: of an integer; a divisor of 32.
    """

    bits: int

    def values(self, parts: Mapping[str, Tensor]) -> Tensor:
        """As of `Scaled`; stored plus 2^(bits − 1), which zero points are, too."""
        rows, columns = self.shape
        unpacked = {**parts, "weight": unpack(parts["weight"], self.bits)[:, :columns]}
        if "zero" in parts:
            zero = unpack(parts["zero"].T, self.bits).T  # these are packed along the columns
            unpacked["zero"] = zero[:rows]
        else:
            unpacked["weight"] = unpacked["weight"] - (1 << (self.bits - 1))
        return super().values(unpacked)


@dataclass(frozen=True)
class PackedFP4(QuantizedWeight):
    """Two float4 values a byte, a scale a group, one more for the tensor (NVFP4, MXFP4)."""

    def values(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See above; compressed-tensors divides by the tensor's own scale."""
        values, scale = fp4(parts["weight"]), scales(parts["scale"])
        if "global" in parts:
            scale = scale / parts["global"].to(torch.float32)
        blocks = (1, self.shape[1] // scale.shape[1])
        return values.mul_(spread(scale, self.shape, blocks))


@dataclass(frozen=True)
class MXFP4Experts(QuantizedWeight):
    """A stack of experts' weights in MXFP4, as gpt-oss has them.

    Stored are blocks `(experts, out, groups, 16)` and exponents `(experts, out, groups)`; the
    model's weight is `(experts, in, out)`.
    """

    def values(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See above."""
        values = fp4(parts["blocks"]).mul_(scales(parts["scales"])[..., None])
        return values.flatten(2).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class BnbInt8(QuantizedWeight):
    """`q · SCB / 127`: int8 with a scale for each row (bitsandbytes' LLM.int8())."""

    def values(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See above, in bitsandbytes' order."""
        scale = parts["scale"].to(torch.float32).reshape(-1, 1)
        return (parts["weight"].to(torch.float32) * scale).mul_(_BNB_127)


@dataclass(frozen=True)
class BnbFourBit(QuantizedWeight):
    """`map[code] · absmax`: 4-bit codes, two a byte, the high one first (bitsandbytes' nf4, fp4).

    Attributes:
        block: entries under one absmax.
        nested: entries under one absmax of the absmaxes, where these are quantised, too.
        offset: what is added to those.
    """

    block: int
    nested: int
    offset: float

    def values(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See above."""
        absmax = parts["absmax"]
        if "nested_absmax" in parts:
            known = parts["nested_map"].to(torch.float32)[absmax.reshape(-1).long()]
            absmax = _by_block(known, parts["nested_absmax"], self.nested) + self.offset
        packed = parts["weight"].contiguous().reshape(-1).view(torch.uint8)
        codes = torch.stack((packed >> 4, packed & 15), 1).reshape(-1)
        codes = codes[: torch.Size(self.shape).numel()]
        values = parts["map"].to(torch.float32)[codes.long()]
        return _by_block(values, absmax.to(torch.float32), self.block).reshape(self.shape)


@dataclass(frozen=True)
class GPTQ(QuantizedWeight):
    """`(q − zero) · scale` by group of input channels, packed along them; stored transposed.

    Attributes:
        bits: of an integer; 3 of them may lie across two words.
        shift: what zero points were stored less: 1, but 0 in the format `gptq_v2`.
    """

    bits: int
    shift: int

    def values(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See above."""
        out, count = self.shape
        scale, limit = parts["scales"].to(torch.float32), (1 << self.bits) - 1
        zero = (unpack(parts["qzeros"], self.bits)[:, :out] + self.shift) & limit
        codes = unpack(parts["qweight"].T, self.bits)[:, :count].T
        if "g_idx" in parts:
            group = parts["g_idx"].long()
        else:
            group = torch.arange(count) // -(-count // len(scale))
        values = (codes - zero[group]).to(torch.float32).mul_(scale[group])
        return values.T.contiguous()


@dataclass(frozen=True)
class AWQ(QuantizedWeight):
    """`(q − zero) · scale` by group of input channels, 8 outputs a word; stored transposed."""

    def values(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See above."""
        scale = parts["scales"].to(torch.float32)
        codes, zero = _awq(parts["qweight"]), _awq(parts["qzeros"])
        group = len(codes) // len(scale)
        values = (codes - zero.repeat_interleave(group, 0)).to(torch.float32)
        return values.mul_(scale.repeat_interleave(group, 0)).T.contiguous()


def unpack(words: Tensor, bits: int) -> Tensor:
    """Integers packed along the last axis, the lowest bits first, some across two words.

    Args:
        words: int32 `(rows, count)`.
        bits: of an integer, 2 to 8.

    Returns:
        int32 `(rows, 32 · count // bits)`.
    """
    rows, count = words.shape
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        return ((words[..., None] >> shifts) & ((1 << bits) - 1)).reshape(rows, -1)
    shifts = torch.arange(32, dtype=torch.int32)
    stream = ((words[..., None] >> shifts) & 1).reshape(rows, -1)
    whole = stream[:, : 32 * count // bits * bits].reshape(rows, -1, bits)
    weights = 1 << torch.arange(bits, dtype=torch.int32)
    return (whole * weights).sum(-1, dtype=torch.int32)


def fp4(packed: Tensor) -> Tensor:
    """Two float4 values a byte, the low one first: uint8 `(…, n)` → float32 `(…, 2n)`."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return torch.tensor(FP4)[codes.long()]


def scales(stored: Tensor) -> Tensor:
    """Scales as float32; those in uint8 are exponents of 2, plus 127."""
    values = stored.to(torch.float32)
    return torch.exp2(values - 127) if stored.dtype == torch.uint8 else values


def blocks_of(
    shape: tuple[int, ...], grid: tuple[int, ...], told: tuple[int, ...] = ()
) -> tuple[int, ...] | None:
    """How many entries along each axis are under one scale.

    Args:
        shape: the weight's.
        grid: the scales'; fewer axes are the first ones.
        told: what the checkpoint's settings say of the last axes.

    Returns:
        a number for each axis; None where the scales fit the weight in no way.
    """
    grid = _padded(grid, shape)
    told = (*(0 for _ in shape), *told)[-len(shape) :]
    found = []
    for size, count, block in zip(shape, grid, told, strict=True):
        if block > 0 and -(-size // block) == count:
            found.append(block)
        elif count and size % count == 0:
            found.append(size // count)
        else:
            return None
    return tuple(found)


def spread(
    per_block: Tensor, shape: tuple[int, ...], blocks: tuple[int, ...], groups: Tensor | None = None
) -> Tensor:
    """One number a block, as one that broadcasts with the weight.

    Args:
        per_block: a number for each block.
        shape: the weight's.
        blocks: see `blocks_of`.
        groups: the group of each entry of the last axis, where they are not in order.
    """
    result = per_block.reshape(_padded(tuple(per_block.shape), shape))
    for axis, (size, block) in enumerate(zip(shape, blocks, strict=True)):
        if groups is not None and axis == len(shape) - 1 and result.shape[axis] > 1:
            result = result.index_select(axis, groups.long())
        elif block > 1 and result.shape[axis] > 1:
            result = result.repeat_interleave(block, axis).narrow(axis, 0, size)
    return result


def _padded(grid: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """A grid of as many axes as the weight: a single number, or one for each row."""
    if torch.Size(grid).numel() == 1:
        return (1,) * len(shape)
    return (*grid, *(1 for _ in shape[len(grid) :]))


def _by_block(values: Tensor, scale: Tensor, block: int) -> Tensor:
    """Flat values times one number for each block of them; the last may be shorter."""
    whole = len(values) // block
    values[: whole * block].view(whole, block).mul_(scale.reshape(-1, 1)[:whole])
    if whole * block < len(values):
        values[whole * block :].mul_(scale.reshape(-1)[whole])
    return values


def _awq(words: Tensor) -> Tensor:
    nibbles = unpack(words, 4).reshape(len(words), -1, 8)
    return nibbles[..., torch.tensor(_AWQ_ORDER)].reshape(len(words), -1)
