"""EMR-Merging: elect one unified vector, then a mask and a rescaler per task (2405.17461)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusionkit.codecs import kernels
from fusionkit.codecs.base import WHOLE_MODEL, DeltaCodec, Encoded, Encoder, Parts, SharedParts
from fusionkit.codecs.layout import Layout, PartSpec
from fusionkit.codecs.operands import Masked
from fusionkit.codecs.packing import bits_spec, pack_bits, unpack_bits
from fusionkit.codecs.values import (
    ValueDtype,
    held_values,
    pack_values,
    unpack_values,
    values_bytes,
    values_layout,
)
from fusionkit.merges.elect import signs
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import TaskVectors


@dataclass(frozen=True)
class EMR(DeltaCodec):
    """Elect, mask, rescale: θ̂_t = θ₀ + λ_t M_t ⊙ τ_uni.

    One vector is shared by all tasks; a task owns one bit per parameter and a scalar. The
    rescaler is Σ|τ_t| / Σ|M_t ⊙ τ_uni| over the whole model, the paper's formula. Adding a task
    later masks the stored vector, which is then no longer elected from all tasks. What comes back
    is off from λ_t M_t ⊙ τ_uni by λ_t times the rounding of τ_uni's dtype.

    Args:
        rescale: `l1`: the paper's formula. `l1_mean`: the authors' code, which sums each tensor's
            mean instead of its entries. `l2`: ⟨|τ_t|, M_t ⊙ |τ_uni|⟩ / ‖M_t ⊙ τ_uni‖², the least
            squares optimum. `none`: λ = 1.
        scope: one rescaler per task over the whole `model`, or one per `tensor`.
        dtype: how the shared vector's values are stored.
    """

    id: ClassVar[str] = "emr"
    cost: ClassVar[str] = "P bits (a mask) and a scalar; shared by all: b P in a dtype of b bits"
    rescale: Literal["l1", "l1_mean", "l2", "none"] = "l1"
    scope: Literal["model", "tensor"] = "model"
    dtype: ValueDtype = "fp16"

    def likely_bytes(self, shapes: Mapping[str, Sequence[int]], tasks: int) -> int | None:
        """A bit of each value of each task, and the vector that all share."""
        masks = sum(-(-math.prod(shape) // 8) for shape in shapes.values())
        return tasks * masks + values_bytes(shapes, self.dtype)

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """Nothing to prepare: masks and shared vector as they come, the rescalers at the end."""

        def encode(vectors: TaskVectors) -> Encoded:
            stored = None if shared is None else self._unified(shared(vectors.name), vectors)
            unified, masks, ratio = self._tensor(vectors, stored)
            sums = ratio if self.scope == "model" else None
            if not (ratio[1] if stored is None else stored).any():
                return Encoded(vectors.name, sums=sums)
            own: list[dict[str, Tensor]] = [{"mask": mask} for mask in masks]
            if self.scope == "tensor":
                for parts, rescaler in zip(own, self._rescaler(ratio), strict=True):
                    parts["rescaler"] = rescaler
            return Encoded(vectors.name, unified, own, sums)

        def finish(total: Tensor | None) -> Encoded | None:
            if total is None:
                return None
            rescalers = self._rescaler(total)
            return Encoded(WHOLE_MODEL, tasks=[{"rescaler": rescaler} for rescaler in rescalers])

        return Encoder(encode, finish)

    def layout(self, shape: torch.Size) -> Layout:
        """The elected vector, the mask, and the rescaler, wherever it is."""
        return {
            **values_layout((shape.numel(),), self.dtype, "elected"),
            "mask": bits_spec(shape.numel()),
            "rescaler": PartSpec(torch.float32, (1,)),
        }

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """λ_t M_t ⊙ τ_uni."""
        delta = unpack_values(parts, shape.numel(), self.dtype, "elected")
        delta *= unpack_bits(parts["mask"], shape.numel())
        return delta.mul_(parts["rescaler"]).view(shape)

    def operand(self, parts: Parts, shape: torch.Size) -> Masked:
        """The mask over the shared vector."""
        values = held_values(parts, shape.numel(), self.dtype, "elected")
        return Masked(values, parts["mask"], float(parts["rescaler"]))

    def _tensor(
        self, vectors: TaskVectors, stored: Tensor | None
    ) -> tuple[Parts, list[Tensor], Tensor]:
        """One tensor's elected vector, packed masks, the rescalers' two sums `(2, T)`.

        Block by block, each stored at once: never is one of them whole in float32.
        """
        total = vectors.shape.numel()
        unified: dict[str, _Joined] = {}
        masks = torch.empty(len(vectors), -(-total // 8), dtype=torch.uint8, device=vectors.device)
        ratio = torch.zeros(2, len(vectors), dtype=torch.float64)
        memory = torch.empty(0, device=vectors.device)
        flags = stored is not None, self.rescale == "l2"
        for place, block in vectors.blocks():
            if stored is not None:
                elected = stored[place]
            else:
                if block.shape[1] > len(memory):
                    memory = block.new_empty(block.shape[1])
                elected = memory[: block.shape[1]]
            if block.device.type == "cpu":
                arrays = block.numpy(), elected.numpy(), masks.numpy(), ratio.numpy()
                kernels.elect(*arrays, place.start, *flags)
            else:
                _elect_in_torch(block, elected, masks, ratio, place.start, *flags)
            if stored is not None:
                continue
            for part, values in pack_values(elected, self.dtype, "elected").items():
                size = math.ceil(total * (values.numel() / elected.numel())) + 1
                unified.setdefault(part, _Joined(size)).add(values)
        if self.rescale == "l1_mean":
            ratio /= max(total, 1)
        joined = {part: each.tensor for part, each in unified.items()}
        return joined, list(masks), ratio

    def _rescaler(self, ratio: Tensor) -> Tensor:
        """λ per task: float32 `(T, 1)`; 1 where nothing is masked in."""
        top, bottom = ratio
        if self.rescale == "none":
            top, bottom = torch.ones_like(top), torch.ones_like(top)
        return torch.where(bottom > 0, top / bottom, 1.0).to(torch.float32)[:, None]

    def _unified(self, parts: Parts, vectors: TaskVectors) -> Tensor:
        count = vectors.shape.numel()
        if not parts:
            return torch.zeros(count, device=vectors.device)
        return unpack_values(parts, count, self.dtype, "elected").to(vectors.device)


class _Joined:
    """Blocks put after each other, in memory taken once.

    Args:
        size: how many entries there will be, at most.
    """

    def __init__(self, size: int) -> None:
        self._size, self._filled = size, 0
        self._memory = torch.empty(0)

    def add(self, block: Tensor) -> None:
        """Put a block after the last one."""
        if not self._filled:
            self._memory = torch.empty(self._size, dtype=block.dtype, device=block.device)
        end = self._filled + block.numel()
        self._memory[self._filled : end] = block
        self._filled = end

    @property
    def tensor(self) -> Tensor:
        """All blocks, one axis."""
        return self._memory[: self._filled]


def _elect_in_torch(
    vectors: Tensor,
    elected: Tensor,
    masks: Tensor,
    sums: Tensor,
    first: int,
    given: bool,
    squared: bool,
) -> None:
    """`kernels.elect` on any device; `vectors` are changed."""
    sign = signs(elected if given else vectors.sum(0))
    vectors.mul_(sign)
    if not given:
        torch.mul(vectors.amax(0).clamp_(min=0.0), sign, out=elected)
    magnitude = elected.abs()
    kept = (vectors > 0) & (magnitude > 0)
    for mask, bits in zip(masks, kept, strict=True):
        packed = pack_bits(bits)
        mask[first // 8 :][: len(packed)] = packed
    vectors.abs_()
    if squared:
        masked = kept * magnitude.to(torch.float64)
        found = (masked * vectors).sum(1), masked.square().sum(1)
    else:
        found = vectors.sum(1), kept.to(torch.float32) @ magnitude
    sums += torch.stack([each.to(torch.float64) for each in found]).cpu()
