"""Merges by their papers' formulas, in float64; where a sign hangs on rounding, both results."""

from functools import singledispatch
from typing import NamedTuple

import numpy as np

from bounds.rounding import Doubles
from bounds.seen import SLACK
from fusionkit import TIES, Elect, Mean, Merge, Normalized, TaskArithmetic


class Reference(NamedTuple):
    """A merged vector.

    Attributes:
        one: float64 `(P,)`.
        other: the same, where sums that are nearly zero had the other sign.
        slack: what float32 may take from each entry.
    """

    one: Doubles
    other: Doubles
    slack: Doubles


@singledispatch
def merged(merge: Merge, flat: Doubles) -> Reference:
    """What becomes of `(T, P)` task vectors."""
    raise TypeError(f"no formula of {merge!r}")


def plain(values: Doubles, flat: Doubles, scale: float = 1.0) -> Reference:
    """Of a sum of task vectors, times a scale."""
    slack = abs(scale) * len(flat) * SLACK * np.abs(flat).sum(0)
    return Reference(values, values, slack + 1e-44)


@merged.register
def _(merge: Mean, flat: Doubles) -> Reference:
    return plain(flat.mean(0), flat, 1 / len(flat))


@merged.register
def _(merge: TaskArithmetic, flat: Doubles) -> Reference:
    return plain(merge.scale * flat.sum(0), flat, merge.scale)


@merged.register
def _(merge: Elect, flat: Doubles) -> Reference:
    up, down = flat.max(0).clip(0), -(-flat).max(0).clip(0)
    total, unsure = flat.sum(0), unsure_of(flat)
    one = np.where(total > 0, up, down)
    return Reference(one, np.where(unsure, np.where(total > 0, down, up), one), 0 * total)


@merged.register
def _(merge: Normalized, flat: Doubles) -> Reference:
    lengths = np.sqrt(np.square(flat).sum(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.where(lengths > 0, lengths.mean() / lengths, 1.0) ** merge.power
    scaled = flat * scales[:, None]
    one, other, slack = merged(merge.merge, scaled)
    return Reference(one, other, slack + SLACK * np.abs(scaled).sum(0) + 1e-44 * len(flat))


@merged.register
def _(merge: TIES, flat: Doubles) -> Reference:
    count = round(merge.density * flat.shape[1])
    kept = np.zeros_like(flat)
    for row, values in zip(kept, np.abs(flat), strict=True):
        if count:
            row[:] = values >= np.sort(values)[::-1][count - 1]
    trimmed = flat * kept
    total, unsure = trimmed.sum(0), unsure_of(trimmed)

    def agreed(sign: Doubles) -> Doubles:
        values = np.where(trimmed * sign > 0, trimmed, 0)
        aligned: Doubles = values.sum(0)
        if merge.aggregate == "mean":
            aligned = aligned / (values != 0).sum(0).clip(1)
        return merge.scale * aligned

    slack = plain(total, flat, merge.scale).slack
    one = agreed(np.sign(total))
    return Reference(one, np.where(unsure, agreed(-np.sign(total)), one), slack)


def unsure_of(flat: Doubles) -> Doubles:
    """Where rounding decides on a sum's sign."""
    found: Doubles = np.abs(flat.sum(0)) <= len(flat) * SLACK * np.abs(flat).sum(0)
    return found
