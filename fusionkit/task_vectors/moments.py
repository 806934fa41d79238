"""What data have told of a matrix: which directions of an error in it a task's outputs feel."""

from typing import NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """Factors L of two second moments, L Lᵀ, each of mean eigenvalue 1; None: of no known one.

    An error E is felt as ‖L_leftᵀ E L_right‖².

    Attributes:
        left: float32 `(rows, rows)`, lower triangular, invertible.
        right: float32 `(columns, columns)`, likewise.
    """

    left: Tensor | None
    right: Tensor | None


UNKNOWN = Moments(None, None)
"""Of a matrix of which nothing is known."""
