"""ComPEFT: signs of the largest entries, times one scalar a task (Yadav et al., 2311.13171)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionkit import (
    WHOLE_MODEL,
    DeltaCodec,
    Encoded,
    Encoder,
    Family,
    Parts,
    SharedParts,
    TaskVectors,
)
from fusionkit.codecs.layout import Layout, PartSpec
from fusionkit.codecs.operands import Operand, Sparse, scaled
from fusionkit.codecs.packing import decode_positions, encode_positions, pack_bits, unpack_bits
from fusionkit.errors import CodecError
from fusionkit.task_vectors import Thresholds


@dataclass(frozen=True)
class ComPEFT(DeltaCodec):
    """Sparsify and quantise to three values: θ̂_t = θ₀ + a σ(τ_t) sgn(τ_t) where |τ_t| is large.

    The largest magnitudes are taken, and σ, the standard deviation, over the whole task vector.
    Positions are Golomb-Rice coded, signs take a bit each, the scalar a σ 4 bytes a task; it can
    be learned by `fusionkit calibrate`. An entry that is kept is off by ||τ_t| − a σ|, the others
    by all that they were.

    Args:
        density: share of the entries that is kept, in (0, 1].
        scale: a; none: the one of least weight error, which makes a σ the mean magnitude kept.

    Raises:
        CodecError: the density is outside (0, 1].
    """

    id: ClassVar[str] = "compeft"
    learned: ClassVar[tuple[str, ...]] = ("scale",)
    density: float = 0.1
    scale: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise CodecError(f"expected ComPEFT's density in (0, 1], got {self.density}")

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """Two or three passes to find the thresholds; the scalars come at the end."""
        counts = [round(self.density * family.parameters)] * len(family.tasks)
        thresholds = Thresholds.over(family, counts)

        def encode(vectors: TaskVectors) -> Encoded:
            sums = torch.zeros(4, len(vectors), dtype=torch.float64)  # count, Σ|τ|; Σ τ, Σ τ²
            own = []
            for task, vector in enumerate(vectors):
                flat = vector.view(-1)
                positions = thresholds.positions(flat, task, vectors.name)
                values = flat[positions]
                double = flat.to(torch.float64)
                sums[0, task] = len(values)
                sums[1, task] = values.abs().sum(dtype=torch.float64)
                sums[2:, task] = torch.stack([double.sum(), double.square().sum()])
                own.append(_ternary(positions, values, flat.numel()) if len(values) else {})
            return Encoded(vectors.name, tasks=own, sums=sums)

        def finish(total: Tensor | None) -> Encoded | None:
            if total is None:
                return None
            kept, moments = total[:2], total[2:]
            magnitudes = kept[1] / kept[0].clamp(min=1)
            if self.scale is not None:
                mean, square = moments / family.parameters
                magnitudes = self.scale * (square - mean.square()).clamp(min=0).sqrt()
            scales = magnitudes.to(torch.float32)[:, None]
            return Encoded(WHOLE_MODEL, tasks=[{"scale": scale} for scale in scales])

        return Encoder(encode, finish)

    def layout(self, shape: torch.Size) -> Layout:
        """Positions, signs, and the scalar of the whole model."""
        return {
            "positions": PartSpec(torch.uint8, (None,)),
            "signs": PartSpec(torch.uint8, (None,)),
            "scale": PartSpec(torch.float32, (1,)),
        }

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """A σ sgn(τ_t) where it was kept; differentiable in a σ."""
        positions = decode_positions(parts["positions"], shape.numel())
        signs = unpack_bits(parts["signs"], positions.numel()).to(torch.float32).mul_(2).sub_(1)
        delta = torch.zeros(shape.numel(), device=signs.device)
        delta[positions] = signs
        return (delta * parts["scale"]).view(shape)

    def operand(self, parts: Parts, shape: torch.Size) -> Operand:
        """The signs at their positions."""
        positions = decode_positions(parts["positions"], shape.numel())
        signs = unpack_bits(parts["signs"], len(positions)).to(torch.int8).mul_(2).sub_(1)
        return scaled(Sparse.of(positions, signs, shape), float(parts["scale"]))


def _ternary(positions: Tensor, values: Tensor, total: int) -> dict[str, Tensor]:
    return {"positions": encode_positions(positions, total), "signs": pack_bits(values > 0)}
