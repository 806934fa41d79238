"""A safetensors file, read tensor by tensor or in pieces: only what was read is in memory.

Not through a memory map: its pages stay resident for as long as it is open, and a file that
is cut short while it is mapped ends the process.
"""

import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusionkit.checkpoints.checkpoint import Checkpoint, Pieces, TensorSpec, reading
from fusionkit.checkpoints.paths import is_remote
from fusionkit.errors import CheckpointError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


_AHEAD = 1 << 17
_LONGEST = 100 << 20
"""Bytes of a header, as safetensors has it."""


class SafetensorsFile(Checkpoint):
    """A safetensors file, on disk or remote.

    Args:
        path: the file.
        label: how messages call it.

    Raises:
        CheckpointError: it is not a whole safetensors file, or holds an unknown dtype.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.label, self.files = label, (path,)
        self._path = path
        try:
            if not is_remote(path):
                with safe_open(path, framework="np"):
                    pass  # looks at all of the header
            self.nbytes = path.stat().st_size
            header, start = _header(path, self.nbytes)
            self._stamp = None if is_remote(path) else _stamp(path.stat())
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); fetch or save it again"
            ) from error
        specs: dict[str, TensorSpec] = {}
        self._starts: dict[str, int] = {}
        for name, entry in header.items():
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise CheckpointError(
                    f"{path}: tensor '{name}' has dtype {entry['dtype']}, unknown here"
                )
            specs[name] = TensorSpec(tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]])
            self._starts[name] = start + entry["data_offsets"][0]
        self.specs = specs

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, the caller's own.

        Raises:
            KeyError: there is none of this name.
            CheckpointError: it can't be read, or the file was changed since it was opened.
        """
        with reading(self.label, name):
            spec = self.specs[name]
            return self._pieces(name)(slice(0, spec.numel)).view(spec.shape)

    def prefetch(self, name: str) -> None:
        """Have the system read a tensor ahead into its cache, where it can."""
        if self._stamp is None or not hasattr(os, "posix_fadvise"):
            return
        start, size = self._starts[name], self.specs[name].nbytes
        # What fails here is met again, and reported, when the tensor is read.
        with suppress(OSError), self._path.open("rb") as file:
            for offset in range(start, start + size, _AHEAD):  # Linux reads no more at once
                left = min(_AHEAD, start + size - offset)
                os.posix_fadvise(file.fileno(), offset, left, os.POSIX_FADV_WILLNEED)

    def pieces(self, name: str) -> Pieces:
        """A tensor, to be read in pieces; the file stays open for as long as they are kept.

        Raises:
            CheckpointError: it can't be read, or the file was changed since it was opened.
        """
        with reading(self.label, name):
            return self._pieces(name)

    def _pieces(self, name: str) -> "_Pieces":
        place = self._path, name, self._starts[name], self.specs[name].dtype
        if self._stamp is None or not hasattr(os, "preadv"):
            return _SeekingPieces(*place)
        pieces = _LocalPieces(*place)
        if pieces.stamp != self._stamp:
            raise CheckpointError(
                f"{self._path}: tensor '{name}' can't be read: the file was changed after it was "
                "opened; start again"
            )
        return pieces


class _Pieces(ABC):
    """Reads parts of one tensor into memory that is used again."""

    def __init__(self, path: Path, name: str, start: int, dtype: torch.dtype) -> None:
        self._path, self._name, self._start, self._dtype = path, name, start, dtype
        self._memory = torch.empty(0, dtype=dtype)
        self._open()

    @abstractmethod
    def _open(self) -> None:
        """Open the file."""

    @abstractmethod
    def _read(self, memory: memoryview, offset: int) -> int:
        """Read some bytes from an offset on; how many."""

    def __call__(self, place: slice) -> Tensor:
        count = place.stop - place.start
        if count > len(self._memory):
            self._memory = torch.empty(count, dtype=self._dtype)
        values = self._memory[:count]
        left = values.view(torch.uint8).numpy().data
        offset = self._start + place.start * self._dtype.itemsize
        while left.nbytes:
            read = self._read(left, offset)
            if not read:
                raise CheckpointError(
                    f"{self._path}: tensor '{self._name}' can't be read: the file was cut short "
                    "after it was opened; fetch or save it again"
                )
            left, offset = left[read:], offset + read
        return values


class _LocalPieces(_Pieces):
    """Of a file of the local disk; among many tasks' files, few stay open."""

    _file = -1
    _spare = threading.Semaphore(256)

    def _open(self) -> None:
        if self._spare.acquire(blocking=False):
            try:
                self._file = os.open(self._path, os.O_RDONLY)
            except OSError:
                self._spare.release()
                raise

    def _read(self, memory: memoryview, offset: int) -> int:
        if self._file >= 0:
            return os.preadv(self._file, [memory[: 1 << 30]], offset)
        with self._path.open("rb") as file:
            return os.preadv(file.fileno(), [memory[: 1 << 30]], offset)

    @property
    def stamp(self) -> tuple[int, int]:
        """Size and time of the file's last change."""
        return _stamp(self._path.stat() if self._file < 0 else os.fstat(self._file))

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._spare.release()


class _SeekingPieces(_Pieces):
    """Of a remote file, or where the system can't read at an offset."""

    def _open(self) -> None:
        self._file: Any = self._path.open("rb")

    def _read(self, memory: memoryview, offset: int) -> int:
        self._file.seek(offset)
        return int(self._file.readinto(memory))


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself: the texts under `__metadata__` in its header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return dict(header.get("__metadata__", {}))


def _header(path: Path, size: int) -> tuple[Mapping[str, Any], int]:
    """What the header says of each tensor, and where the data start."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _LONGEST):
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype and stop - start != TensorSpec(tuple(entry["shape"]), dtype).nbytes:
            raise ValueError(f"'{name}' has another size than its shape says")
        end = max(end, stop)
    if 8 + length + end != size:
        raise ValueError(f"it should have {8 + length + end} bytes and has {size}")
    return header, 8 + length


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values, in row-major order; its own memory where it can be."""
    # Through uint8, since NumPy knows no bfloat16; clones nothing that is contiguous already.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
