"""What the compiled inner loops share: how they are compiled, and the tiles that they work on."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])


Floats = NDArray[np.float32]


TILE = 1024
"""Entries that are worked on while they are in the first-level cache; a multiple of 8."""


GATHER, TOP = np.uint64(0x0102040810204080), np.uint64(56)
"""Eight bytes of 0 or 1, times the one and shifted by the other, are the bits of one byte."""


def compiled(function: Function) -> Function:
    """Compile at the first call, before which Numba is not even imported.

    Sums may be taken in another order, so that they are vectorised.
    """
    made: Function | None = None

    @wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal made
        if made is None:
            made = _compile(function)
        return made(*arguments)

    return cast(Function, call)


def _compile(function: Function) -> Function:
    import numba

    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc"}}
    try:
        return cast(Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no folder that can be written to
        return cast(Function, numba.njit(**options)(function))
