"""EMR-Merging's election (2405.17461)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionkit.merges.base import TensorMerge
from fusionkit.task_vectors.kernels import above


@dataclass(frozen=True)
class Elect(TensorMerge):
    """EMR-Merging's elected vector τ_uni alone (Huang et al., 2405.17461)."""

    id: ClassVar[str] = "elect"

    def merge(self, vectors: Tensor) -> Tensor:
        """τ_uni."""
        return elect(vectors)[0]


def elect(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Elect the unified vector: γ = sgn(Σ τ_t), ε = max of |τ_t| over tasks of sign γ, τ_uni = γ ε.

    A sign sum of exactly 0 counts as negative, as in the authors' code.

    Args:
        vectors: float32 `(T, *shape)`.

    Returns:
        τ_uni, float32 `(*shape)`, and the masks, bool `(T, *shape)`: where τ_t ⊙ τ_uni > 0.
    """
    sign = signs(vectors.sum(0))
    aligned = vectors * sign
    return aligned.amax(0).clamp_(min=0.0).mul_(sign), above(aligned, 0)


def signs(values: Tensor) -> Tensor:
    """1 where a value is positive, else −1: float32, of the same shape."""
    # torch.where would take several times as long.
    return above(values, 0).view(torch.uint8).to(torch.float32).mul_(2).sub_(1)
