"""What a codec's parts must be: dtype and shape, to which those of a file are held."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

SCALE = ".scale"
"""After a part's name: the scales of its integers, which are never there without it."""


class PartSpec(NamedTuple):
    """What a part must be.

    Attributes:
        dtype: its dtype.
        shape: how long each axis is; None: as long as it likes.
    """

    dtype: torch.dtype
    shape: tuple[int | None, ...]

    @classmethod
    def of(cls, part: Tensor) -> "PartSpec":
        """What a part is."""
        return cls(part.dtype, tuple(part.shape))

    def fits(self, part: Tensor) -> bool:
        """Whether a part is that."""
        return (
            part.dtype == self.dtype
            and len(part.shape) == len(self.shape)
            and all(
                wanted in (None, size) for wanted, size in zip(self.shape, part.shape, strict=True)
            )
        )

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{str(self.dtype).removeprefix('torch.')} [{sizes}]"


Layout = Mapping[str, PartSpec]
"""Name of a part → what it must be."""


def check_parts(parts: Mapping[str, Tensor], layout: Layout) -> None:
    """Check parts that come from a file, before anything is made of them.

    Args:
        parts: the parts; some of what `layout` names may be missing.
        layout: what they must be; a part that it does not name may be anything.

    Raises:
        ValueError: one is another.
    """
    for name, part in parts.items():
        spec = layout.get(name)
        if spec is not None and not spec.fits(part):
            raise ValueError(f"part '{name}' is {PartSpec.of(part)}, expected {spec}")
        values = name.removesuffix(SCALE)
        if values != name and values in layout and values not in parts:
            raise ValueError(f"part '{name}' is there, and not what it is the scale of")
