"""A file of the local disk, read at offsets, that must stay as it was when it was opened.

Not through a memory map: a file that is cut short while it is mapped ends the process, and what is
written over it is read without a word. Here either is an error.
"""

import os
import threading
from pathlib import Path

import torch
from torch import Tensor

_MOST = 1 << 30
"""Bytes that are asked of the system at once."""


class SteadyFile:
    """A file, open for as long as this is kept; of many, only some stay open.

    Args:
        path: the file.

    Attributes:
        path: the file.
        size: its bytes.

    Raises:
        OSError: it can't be opened.
    """

    _spare = threading.Semaphore(256)

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1
        self._stamp = stamp_of(path.stat())
        self.size = self._stamp[1]

    def read(self, start: int, size: int) -> Tensor:
        """Some bytes, uint8 `(size,)`, the caller's own.

        Raises:
            OSError: they can't be read, or the file was changed since it was opened.
        """
        if start < 0 or start + size > self.size:
            raise OSError(f"it ends at byte {self.size}, before {start + size}")
        found = torch.empty(size, dtype=torch.uint8)
        self.read_into(found.numpy().data, start)
        return found

    def read_into(self, memory: memoryview, start: int) -> None:
        """Fill memory with the bytes from an offset on.

        Raises:
            OSError: they can't be read, or the file was changed since it was opened.
        """
        file = self._opened()
        try:
            while memory.nbytes:
                read = _read_at(file, memory[:_MOST], start)
                if not read:
                    raise OSError("the file was cut short after it was opened")
                memory, start = memory[read:], start + read
            # Looked at behind the reading: whatever was written over it before then, shows.
            if stamp_of(os.fstat(file)) != self._stamp:
                raise OSError("the file was changed after it was opened; open it again")
        finally:
            if file != self._file:
                os.close(file)

    def read_ahead(self, start: int, size: int) -> None:
        """Have the system read bytes ahead into its cache, where it can."""
        if not hasattr(os, "posix_fadvise"):
            return
        file = self._opened()
        try:
            for offset in range(start, start + size, _AHEAD):  # Linux reads no more at once
                left = min(_AHEAD, start + size - offset)
                os.posix_fadvise(file, offset, left, os.POSIX_FADV_WILLNEED)
        finally:
            if file != self._file:
                os.close(file)

    def _opened(self) -> int:
        """The file, open; whoever gets another than `_file` closes it."""
        if self._file >= 0:
            return self._file
        file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        if self._spare.acquire(blocking=False):
            with _ALONE:
                if self._file < 0:
                    self._file = file
                    return file
            self._spare.release()
        return file

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_file": -1}  # each process has its own

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)
            self._spare.release()


_ALONE = threading.Lock()
_AHEAD = 1 << 17


def stamp_of(stat: os.stat_result) -> tuple[int, int, int]:
    """What tells a file from another, or from itself once it was written to."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read_at(file: int, memory: memoryview, start: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, [memory], start)
    with _ALONE:  # a system that can't read at an offset
        os.lseek(file, start, os.SEEK_SET)
        found = os.read(file, memory.nbytes)
    memory[: len(found)] = found
    return len(found)
