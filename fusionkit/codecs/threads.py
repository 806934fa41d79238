"""Compiled loops on several threads, and the memory that a thread keeps for them."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

_SHARE = 1 << 18
"""Entries that are worth a thread."""
CACHED = 1 << 20
"""Entries that stay in the second-level cache, or nearly."""


def over(count: int, unit: int, entries: int, run: Callable[[int, int], None]) -> None:
    """Run over `count` things, split among as many threads as PyTorch has, at multiples of `unit`.

    Args:
        count: how many there are.
        unit: how many are done at once.
        entries: in all of them: what is little has fewer threads.
        run: called with the first, and with the one after the last.
    """
    units = -(-count // unit)
    threads = max(min(torch.get_num_threads(), units, entries // _SHARE), 1)
    bounds = [min(units * i // threads * unit, count) for i in range(threads + 1)]
    parts = [_pool(threads).submit(run, *part) for part in list(pairwise(bounds))[1:]]
    try:
        run(*bounds[:2])
    finally:
        wait(parts)
    for part in parts:
        part.result()


def scratch(name: str, floats: int) -> NDArray[np.float32]:
    """Memory of the thread's own, kept from call to call: what is new costs more than work.

    PyTorch's memory begins at a line of the cache, NumPy's need not.
    """
    kept: NDArray[np.float32] | None = getattr(_own, name, None)
    if kept is None or len(kept) < floats:
        kept = torch.empty(floats, dtype=torch.float32, device="cpu").numpy()
        if floats <= CACHED:
            setattr(_own, name, kept)
    return kept[:floats]


def panels(floats: int) -> NDArray[np.float32]:
    """Two of so many floats, of the thread's own."""
    return scratch("panels", 2 * floats).reshape(2, floats)


_own = threading.local()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "fusionkit")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads are not forked
