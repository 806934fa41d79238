"""A third party's codec: nothing of FusionKit knows of it but its entry point."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionkit.codecs.base import Parts, TensorCodec
from fusionkit.codecs.packing import pack_bits, unpack_bits


@dataclass(frozen=True)
class Ternary(TensorCodec):
    """Keep the sign of large entries, and their mean magnitude."""

    id: ClassVar[str] = "ternary"
    learned: ClassVar[tuple[str, ...]] = ("magnitude",)
    threshold: float = 0.5

    def encode_tensor(self, delta: Tensor, name: str) -> Parts:
        flat = delta.reshape(-1)
        if not flat.any():
            return {}
        kept = flat.abs() > self.threshold * flat.abs().max()
        magnitude = flat[kept].abs().mean()[None]
        return {"kept": pack_bits(kept), "up": pack_bits(flat > 0), "magnitude": magnitude}

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        kept, up = (unpack_bits(parts[part], shape.numel()).float() for part in ("kept", "up"))
        return (kept * (2 * up - 1) * parts["magnitude"]).view(shape)
