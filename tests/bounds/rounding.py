"""How far values may be off by the dtype that they are stored in; see `fusionkit.codecs.values`."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

GROUP = 128
_FLOATS = {
    "fp32": (2.0**-24, 2.0**-150),
    "fp16": (2.0**-11, 2.0**-25),
    "bf16": (2.0**-8, 2.0**-134),
}
"""Half a step, relative and of the smallest values."""
_LEVELS = {"int8": 127, "int4": 7, "int3": 7, "int2": 3}
_SCALE = 2.0**-133
"""The smallest scale: of values below 127 of it nothing may be left."""
_WIDER = 1 + 2.0**-7
"""What rounding a scale to bfloat16 takes at most, up and then by half a step."""


class Allowed(NamedTuple):
    """How far values may be off.

    Attributes:
        each: of every value the largest error.
        energy: the largest sum of all squared errors.
    """

    each: Doubles
    energy: float

    @property
    def norm(self) -> float:
        """The root of `energy`."""
        return float(np.sqrt(self.energy))


def allowed(values: Doubles, dtype: str) -> Allowed:
    """What storing values may take from them.

    Args:
        values: one axis: scales for each group; two: for each column.
        dtype: how they are stored.
    """
    if dtype in _FLOATS:
        relative, least = _FLOATS[dtype]
        each = np.maximum(relative * np.abs(values), least)
        return Allowed(each, float(np.square(each).sum()))
    grouped, count = values, len(values)
    if values.ndim == 1:
        grouped = np.pad(values, (0, -count % GROUP)).reshape(-1, GROUP).T
    largest = np.abs(grouped).max(0, initial=0.0)
    half = largest / (2 * _LEVELS[dtype]) * _WIDER**2
    if dtype in ("int3", "int2"):
        # The scale is no worse than the one whose outermost level is the largest magnitude.
        half, each = largest / _LEVELS[dtype] * _WIDER, largest * _WIDER
        rows = np.full(grouped.shape[1], len(grouped), float)
        if values.ndim == 1 and len(rows):
            rows[-1] = count - GROUP * (len(rows) - 1)
        energy = 1.1 * float((rows * np.square(half + _SCALE * 8)).sum())
        each = each + 8 * _SCALE
    else:
        each = half + 128 * _SCALE
        energy = float((np.square(each) * len(grouped)).sum())
    spread = np.broadcast_to(each, grouped.shape)
    return Allowed(spread.T.reshape(-1)[:count] if values.ndim == 1 else spread, energy)
