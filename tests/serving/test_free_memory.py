"""Memory that is free, given back to the system."""

import ctypes
import re
from pathlib import Path

import pytest

from fusionkit.serving import free_memory
from fusionkit.serving.free_memory import FreeMemory


def resident() -> int:
    """Bytes of this process that are in memory."""
    [found] = re.findall(r"^Pss:\s+(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.M)
    return 1024 * int(found)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's own")
def test_pieces_that_are_free_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    pieces = [libc.malloc(100_000) for _ in range(1000)]  # below what is mapped by itself
    for piece in pieces:
        ctypes.memset(piece, 1, 100_000)
    for piece in pieces[:-1]:  # the last holds the heap's end
        libc.free(piece)
    memory, full = FreeMemory(), resident()
    memory.give_back()
    assert resident() > full - 20_000_000  # not at every step
    monkeypatch.setattr(free_memory, "monotonic", lambda: 1e12)
    memory.give_back()
    assert resident() < full - 80_000_000
    libc.free(pieces[-1])
