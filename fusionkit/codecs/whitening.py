"""A matrix seen where an error's square is what the outputs feel of it, and back.

An error E in a matrix moves the outputs by about w ‖Lᵀ E R‖²: w is how much they feel an entry, and
L and R are factors of the moments of the rows and of the columns, as data have told them. Of
√w Lᵀ δ R, cut where its singular values are small, what is felt least is lost.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.task_vectors.moments import UNKNOWN, Moments


@dataclass(frozen=True)
class Metric:
    """How errors in one task's tensor are felt; by default all alike.

    Attributes:
        size: √w, of an entry; 1 on average.
        moments: L and R, on the device of what is seen.
    """

    size: float = 1.0
    moments: Moments = UNKNOWN

    def seen(self, matrix: Tensor) -> Tensor:
        """√w Lᵀ δ R, of `(rows, columns)`; the matrix itself where nothing is known."""
        left, right = self.moments
        matrix = matrix if left is None else left.mT @ matrix
        matrix = matrix if right is None else matrix @ right
        return matrix if self.size == 1 else matrix * self.size

    def product(self, factors: LowRank) -> LowRank:
        """The same of a product, without forming it."""
        left, right = (
            side if moment is None else moment.mT @ side
            for side, moment in zip(factors, self.moments, strict=True)
        )
        return LowRank(left if self.size == 1 else left * self.size, right)

    def back(self, left: Tensor, right: Tensor) -> LowRank:
        """The product that is seen as this one, `(rows, r)` and `(columns, r)`."""
        left, right = (
            side if moment is None else torch.linalg.solve_triangular(moment.mT, side, upper=True)
            for side, moment in zip((left, right), self.moments, strict=True)
        )
        if self.size == 1:
            return LowRank(left, right)
        return LowRank(left / self.size**0.5, right / self.size**0.5)


ALIKE = Metric()
"""Where nothing is known."""

Metrics = Callable[[int, str], Metric]
"""A task's place, a tensor's name → how errors in it are felt."""
