"""A family and what its bundle gives back, as arrays: what the bounds are checked on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bounds.rounding import Allowed, Doubles
from fusionkit import Bundle, Family
from fusionkit.codecs.base import WHOLE_MODEL, DeltaCodec

SLACK = 2.0**-20
"""Of a sum of a few float32 terms, over the sum of their magnitudes."""
TINY = 1e-44
"""What of a float32 product may be lost to its smallest values."""


@dataclass
class Seen:
    """One family through one codec.

    Attributes:
        codec: the codec.
        family: whose task vectors, float32, are what was to be kept.
        bundle: what was opened.
        wanted: tensor's name → its task vectors, float64 `(T, *shape)`; none of a codec that
            restores tensors.
        found: the same of what is decoded; zeros where nothing is stored.
    """

    codec: DeltaCodec
    family: Family
    bundle: Bundle
    wanted: dict[str, Doubles] = field(init=False)
    found: dict[str, Doubles] = field(init=False)

    def __post_init__(self) -> None:
        vectors = [] if self.codec.restores else self.family
        self.wanted = {each.name: double(each.stack()) for each in vectors}
        self.found = {}
        for name, wanted in self.wanted.items():
            rows = [self.bundle.delta(task, name) for task in self.family.tasks]
            zero = torch.zeros(wanted.shape[1:])
            self.found[name] = double(torch.stack([zero if row is None else row for row in rows]))

    @property
    def tasks(self) -> Iterator[tuple[int, str]]:
        """Each task's place and name."""
        return iter(enumerate(self.family.tasks))

    @cached_property
    def flat(self) -> Doubles:
        """The whole model's task vectors: float64 `(T, P)`."""
        return self.joined(self.wanted)

    def joined(self, of: dict[str, Doubles]) -> Doubles:
        """Every tensor's entries after each other: float64 `(T, P)`."""
        rows = [values.reshape(len(self.family.tasks), -1) for values in of.values()]
        return np.concatenate(rows, 1)

    def split(self, flat: Doubles) -> dict[str, Doubles]:
        """`(T, P)` → tensor's name → `(T, n)`."""
        ends = np.cumsum([each[0].size for each in self.wanted.values()])[:-1]
        return dict(zip(self.wanted, np.split(flat, ends, 1), strict=True))

    def own(self, task: str, name: str = WHOLE_MODEL) -> dict[str, Tensor]:
        """A task's stored parts."""
        return dict(self.bundle.task_parts(task, name))


def double(tensor: Tensor) -> Doubles:
    """As NumPy's float64."""
    found: Doubles = tensor.detach().to(torch.float64).numpy()
    return found


def check_within(
    found: Doubles, wanted: Doubles, limit: Allowed, what: str, slack: Any = 0
) -> None:
    """Check that each value is off by no more than is allowed, and all of them together."""
    off = np.abs(found.reshape(-1) - wanted.reshape(-1))
    extra = slack + SLACK * np.abs(wanted.reshape(-1)) + TINY
    each = limit.each.reshape(-1) + extra
    if len(off) and (off > each).any():
        at = int((off - each).argmax())
        raise AssertionError(f"{what}: entry {at} is off by {off[at]:.3g}, allowed {each[at]:.3g}")
    total = np.sqrt(np.square(off).sum())
    most = limit.norm + np.sqrt(np.square(np.broadcast_to(extra, off.shape)).sum())
    assert total <= most * (1 + SLACK), f"{what}: off by {total:.3g} in all, allowed {most:.3g}"
