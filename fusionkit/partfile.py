"""A file of payload tensors: plain safetensors, written as a stream and checked on reading.

Keys are `<tensor>/<part>` (`/<part>` for what belongs to the whole model). The header's metadata
holds, beside `format: pt`, one string `digests`: the first 8 bytes of each tensor's SHA-256, in
hex, in the order of the data. The header itself is vouched for by the bundle's manifest, so that
any tensor can be read and checked alone, straight from a memory map. The order of the data is by
alignment, then by key: the same payload gives the same bytes, in whatever order it was written.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from fusionkit.checkpoint import SAFETENSORS_DTYPES
from fusionkit.errors import BundleError

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_BUFFERED = 256 * 1024
_DIGEST = 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class FileRecord:
    """What a manifest keeps of a file: its size in bytes and the SHA-256 of its header."""

    bytes: int
    header_sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.bytes, int) or not isinstance(self.header_sha256, str):
            raise ValueError(f"no record of a file: {self}")  # noqa: TRY004


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: list[int]
    start: int
    nbytes: int
    digest: str


class PartWriter:
    """Writes a file of parts, tensor by tensor; memory stays at one buffer of 256 KiB.

    The data goes to a spool beside the file until `finish`, since a safetensors header comes
    first and is not known before the last tensor.

    Args:
        path: the file; it appears only with `finish`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spool = path.with_name(path.name + ".spool")
        self._entries: dict[str, _Entry] = {}
        self._buffer = bytearray()
        self._spooled = 0
        self._spool.unlink(missing_ok=True)  # an interrupted run's

    def add(self, key: str, tensor: Tensor) -> None:
        """Append one tensor.

        Raises:
            BundleError: the key was added before, or safetensors has no such dtype.
        """
        if key in self._entries:
            raise BundleError(f"{self._path.name}: part '{key}' is written twice")
        if tensor.dtype not in _DTYPE_NAMES:
            raise BundleError(
                f"{self._path.name}: part '{key}' is {tensor.dtype}, unknown to safetensors"
            )
        data = tensor_bytes(tensor)
        self._entries[key] = _Entry(
            tensor.dtype,
            list(tensor.shape),
            self._spooled + len(self._buffer),
            data.nbytes,
            _digest(data),
        )
        if data.nbytes >= _BUFFERED:  # as it is: a copy would be as large as the tensor
            self._flush()
            self._spool_out(data)
        else:
            self._buffer += data
            if len(self._buffer) >= _BUFFERED:
                self._flush()

    def finish(self) -> FileRecord:
        """Write header and data, and remove the spool."""
        self._flush()
        order = sorted(self._entries, key=lambda k: (-self._entries[k].dtype.itemsize, k))
        digests = "".join(self._entries[key].digest for key in order)
        header: dict[str, object] = {"__metadata__": {"format": "pt", "digests": digests}}
        offset = 0
        for key in order:
            entry = self._entries[key]
            header[key] = {
                "dtype": _DTYPE_NAMES[entry.dtype],
                "shape": entry.shape,
                "data_offsets": [offset, offset + entry.nbytes],
            }
            offset += entry.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with self._path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            if offset:
                with self._spool.open("rb") as spool:
                    for key in order:
                        _copy(spool, file, self._entries[key].start, self._entries[key].nbytes)
        self._spool.unlink(missing_ok=True)
        return FileRecord(8 + len(text) + offset, hashlib.sha256(text).hexdigest())

    def _flush(self) -> None:
        if self._buffer:
            self._spool_out(self._buffer)
            self._buffer = bytearray()

    def _spool_out(self, data: bytearray | memoryview) -> None:
        with self._spool.open("ab") as spool:
            spool.write(data)
        self._spooled += len(memoryview(data).cast("B"))


class PartFile:
    """Reads parts from a file, one at a time, each checked against its digest when first read.

    Args:
        path: the file.
        record: what the manifest says of it.

    Raises:
        BundleError: the file is missing or has another size.
    """

    def __init__(self, path: Path, record: FileRecord) -> None:
        self.path = path
        self._record = record
        self._index: dict[str, dict[str, str]] | None = None
        self._digests: dict[str, str] = {}
        self._places: dict[str, tuple[int, int, torch.dtype, list[int]]] = {}
        try:
            size = path.stat().st_size
        except OSError as error:
            raise BundleError(f"{path}: missing from the bundle ({error.strerror})") from error
        if size != record.bytes:
            raise BundleError(
                f"{path}: has {size} bytes, the manifest says {record.bytes}; "
                "the file was truncated or replaced: copy or compress it again"
            )

    def parts(self, name: str, device: torch.device | None = None) -> dict[str, Tensor]:
        """The parts of one tensor, by name; empty if it has none.

        Raises:
            BundleError: the file was changed since it was written.
        """
        keys = self._open().get(name)
        return {part: self._read(key, device) for part, key in keys.items()} if keys else {}

    def names(self) -> Iterator[str]:
        """The names of the tensors that have parts here."""
        return iter(self._open())

    def _open(self) -> dict[str, dict[str, str]]:
        if self._index is None:
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                text = file.read(min(length, self._record.bytes))
            if hashlib.sha256(text).hexdigest() != self._record.header_sha256:
                raise self._damaged("its header")
            header = json.loads(text)
            digests = header.pop("__metadata__")["digests"]
            index: dict[str, dict[str, str]] = {}
            for place, (key, entry) in enumerate(header.items()):
                name, _, part = key.rpartition("/")
                index.setdefault(name, {})[part] = key
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                self._places[key] = (start, end, SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"])
                self._digests[key] = digests[place * _DIGEST : (place + 1) * _DIGEST]
            self._data = torch.from_file(
                str(self.path), shared=False, size=self._record.bytes, dtype=torch.uint8
            )
            self._index = index
        return self._index

    def _read(self, key: str, device: torch.device | None) -> Tensor:
        start, end, dtype, shape = self._places[key]
        tensor = self._data[start:end].view(dtype).view(shape)
        expected = self._digests.pop(key, None)
        if expected is not None and _digest(tensor_bytes(tensor)) != expected:
            self._digests[key] = expected
            raise self._damaged(f"part '{key}'")
        return tensor if device is None else tensor.to(device)

    def _damaged(self, what: str) -> BundleError:
        return BundleError(
            f"{self.path}: {what} is not what was written (SHA-256 differs); the file was damaged "
            "or tampered with: copy or compress it again"
        )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values, in row-major order; its own memory where it can be."""
    # Through uint8, since NumPy knows no bfloat16; clones nothing that is contiguous already.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _digest(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST]


def _copy(source: IO[bytes], target: IO[bytes], start: int, nbytes: int) -> None:
    """Append a part of one file to another; within the kernel, where it can."""
    while nbytes and hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source.fileno(), target.fileno(), nbytes, start)
        except OSError as error:
            if error.errno in _FULL:
                raise
            break  # not between these two, or not on this disk
        if not copied:
            break
        start, nbytes = start + copied, nbytes - copied
    target.seek(0, os.SEEK_END)
    source.seek(start)
    while nbytes:
        chunk = source.read(min(nbytes, _BUFFERED))
        target.write(chunk)
        nbytes -= len(chunk)
    target.flush()
