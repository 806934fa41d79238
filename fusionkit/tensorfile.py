"""A safetensors file, read tensor by tensor or in pieces: only what was read is in memory.

Not through a memory map: its pages stay resident for as long as it is open, and a file that
is cut short while it is mapped ends the process.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusionkit.errors import CheckpointError

Pieces = Callable[[slice], Tensor]
"""Reads some neighbouring entries of one tensor, flattened, in its own dtype; not to be changed,
and valid until the next call."""

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
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


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of entries."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


class TensorFile:
    """A safetensors file on disk.

    Args:
        path: the file.

    Attributes:
        specs: shape and dtype by name.
        nbytes: the file's size.

    Raises:
        CheckpointError: it is not a whole safetensors file, or holds an unknown dtype.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="np"):
                pass  # looks at all of the header
            header, start = _header(path)
            stat = path.stat()
            self.nbytes, self._stamp = stat.st_size, (stat.st_size, stat.st_mtime_ns)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); fetch or save it again"
            ) from error
        self.specs: dict[str, TensorSpec] = {}
        self._starts: dict[str, int] = {}
        for name, entry in header.items():
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise CheckpointError(
                    f"{path}: tensor '{name}' has dtype {entry['dtype']}, unknown here"
                )
            self.specs[name] = TensorSpec(tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]])
            self._starts[name] = start + entry["data_offsets"][0]

    def read(self, name: str) -> Tensor:
        """One tensor, the caller's own.

        Raises:
            CheckpointError: the file was changed since it was opened.
        """
        spec = self.specs[name]
        return self.pieces(name)(slice(0, spec.numel)).view(spec.shape)

    def pieces(self, name: str) -> Pieces:
        """A tensor, to be read in pieces; the file stays open for as long as they are kept.

        Raises:
            CheckpointError: the file was changed since it was opened.
        """
        pieces = _Pieces(self._path, name, self._starts[name], self.specs[name].dtype)
        if pieces.stamp != self._stamp:
            raise CheckpointError(
                f"{self._path}: tensor '{name}' can't be read: the file was changed after it was "
                "opened; start again"
            )
        return pieces


class _Pieces:
    """Reads parts of one tensor into memory that is used again."""

    def __init__(self, path: Path, name: str, start: int, dtype: torch.dtype) -> None:
        self._path, self._name, self._start, self._dtype = path, name, start, dtype
        self._memory = torch.empty(0, dtype=dtype)
        self._file = -1
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __call__(self, place: slice) -> Tensor:
        count = place.stop - place.start
        if count > len(self._memory):
            self._memory = torch.empty(count, dtype=self._dtype)
        values = self._memory[:count]
        left = values.view(torch.uint8).numpy().data
        offset = self._start + place.start * self._dtype.itemsize
        while left.nbytes:
            read = os.preadv(self._file, [left[: 1 << 30]], offset)
            if not read:
                raise CheckpointError(
                    f"{self._path}: tensor '{self._name}' can't be read: the file was cut short "
                    "after it was opened; fetch or save it again"
                )
            left, offset = left[read:], offset + read
        return values

    @property
    def stamp(self) -> tuple[int, int]:
        """Size and time of the file's last change."""
        stat = os.fstat(self._file)
        return stat.st_size, stat.st_mtime_ns

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


def _header(path: Path) -> tuple[Mapping[str, Any], int]:
    """What the header says of each tensor, and where the data start."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length
