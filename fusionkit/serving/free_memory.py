"""Memory that is free, given back to the system."""

import ctypes
from collections.abc import Callable
from time import monotonic
from typing import Any

_EVERY = 30.0
"""Seconds."""


class FreeMemory:
    """Gives free memory back now and then, while there is work.

    Batches of ever new shapes leave glibc's heap in pieces, which it keeps: a process grows for a
    long time that holds no more than at first. Other allocators are left alone.
    """

    def __init__(self) -> None:
        self._trim = _glibc()
        self._next = monotonic() + _EVERY

    def give_back(self) -> None:
        """Give it back, if that has not been done for a while."""
        if self._trim is not None and monotonic() >= self._next:
            self._trim(0)
            self._next = monotonic() + _EVERY


def _glibc() -> Callable[[int], Any] | None:
    try:
        trim: Callable[[int], Any] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return None
    return trim
