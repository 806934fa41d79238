"""How far scores would scatter over other rows: the bootstrap, paired, seeded and vectorised.

The rows that are drawn depend on the task's name and on how many rows it has alone. Two models'
scores on one task are so resampled alike, and the differences that remain are the models'.
"""

import zlib

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000
LEVEL = 0.95
_BLOCK = 1 << 22
"""Draws at a time, which take 32 MiB."""

Interval = tuple[float, float]
"""The ends that `LEVEL` of the resamples lie between."""


def resampled_means(task: str, rows: Tensor) -> Tensor:
    """Means over rows that are drawn with replacement, as many as there are.

    Args:
        task: seeds the draws.
        rows: `(rows, models)`, each row's own score by each model.

    Returns:
        float64 `(RESAMPLES, models)`.
    """
    count = len(rows)
    generator = np.random.default_rng(zlib.crc32(task.encode()))
    values = rows.to("cpu", torch.float64)
    found = torch.empty(RESAMPLES, rows.shape[1], dtype=torch.float64)
    step = max(_BLOCK // max(count, 1), 1)
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn = generator.integers(count, size=(size, count))
        drawn += count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        found[start : start + size] = torch.from_numpy(times).to(torch.float64) @ values / count
    return found


def interval(samples: Tensor) -> Interval:
    """The ends of an interval.

    Args:
        samples: `(RESAMPLES,)` of what was resampled.
    """
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(samples, torch.tensor([tail, 1 - tail], dtype=samples.dtype))
    return float(low), float(high)
