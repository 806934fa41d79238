"""A file of payload tensors: plain safetensors, written as a stream and checked on reading.

Keys are `<tensor>/<part>` (`/<part>` for what belongs to the whole model). The header's metadata
holds, beside `format: pt`, one string `digests`: the first 8 bytes of each tensor's SHA-256, in
hex, in the order of the data. The header itself is vouched for by the bundle's manifest, so that
any tensor can be read and checked alone, straight from a memory map. The data are in the order in
which they were written, without gaps; of large files the header is padded with spaces, as its
room is left before its length is known.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from fusionkit.checkpoints.paths import local_copy
from fusionkit.checkpoints.safetensors_file import SAFETENSORS_DTYPES, tensor_bytes
from fusionkit.errors import BundleError

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_BUFFERED = 256 * 1024
_LARGE = 1 << 26
"""Bytes of data from which a file is no longer written twice."""
_PARTS, _PER_PART, _ROOM = 4, 140, 4096
"""A tensor's parts, and bytes of each in a header beside its name, that room is left for."""
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


class Entry(NamedTuple):
    """What a header says of a part: key, safetensors' dtype, shape, bytes, and its digest."""

    key: str
    dtype: str
    shape: list[int]
    nbytes: int
    digest: str


class Part(NamedTuple):
    """A part to be written: its entry, and its bytes."""

    entry: Entry
    data: memoryview

    @classmethod
    def of(cls, key: str, tensor: Tensor) -> "Part":
        """A tensor as a part; on the CPU from here on.

        Raises:
            BundleError: safetensors has no such dtype.
        """
        if tensor.dtype not in _DTYPE_NAMES:
            raise BundleError(f"part '{key}' is {tensor.dtype}, unknown to safetensors")
        data = tensor_bytes(tensor)
        dtype = _DTYPE_NAMES[tensor.dtype]
        return cls(Entry(key, dtype, list(tensor.shape), data.nbytes, _digest(data)), data)


class PartWriter:
    """Writes a file of parts, one after the other; memory stays at one buffer of 256 KiB.

    A safetensors header comes first and is not known before the last part. Until `finish` a small
    file's data are in a spool beside it; a large file's are where they belong, behind room for the
    header. What the file looks like depends on the parts and their order alone.

    Args:
        path: the file; it appears only with `finish`.
        names: the tensors that parts may be of, to leave room for.
    """

    def __init__(self, path: Path, names: Iterable[str] = ()) -> None:
        self._path = path
        self._spool = path.with_name(path.name + ".spool")
        self._whole = path.with_name(path.name + ".whole")
        self._names = names
        self._entries: dict[str, Entry] = {}
        self._buffer = bytearray()
        self._written = 0
        self._room = 0

    def clear(self) -> None:
        """Remove the data that are not in place, an interrupted run's or this one's."""
        self._room = 0
        self._spool.unlink(missing_ok=True)
        self._whole.unlink(missing_ok=True)

    @property
    def entries(self) -> list[Entry]:
        """What was added so far."""
        return list(self._entries.values())

    @property
    def stored(self) -> tuple[Path, int]:
        """The file that holds the data so far, and where in it they start; after `flush`."""
        return (self._whole, self._room) if self._room else (self._spool, 0)

    def add(self, part: Part) -> None:
        """Append one part.

        Raises:
            BundleError: the key was added before.
        """
        self._enter(part.entry)
        if part.data.nbytes >= _BUFFERED:  # as it is: a copy would be as large as the part
            self.flush()
            self._write(part.data)
        else:
            self._buffer += part.data
            if len(self._buffer) >= _BUFFERED:
                self.flush()

    def add_stored(self, entry: Entry, path: Path, start: int) -> None:
        """Append one part that lies in another file."""
        self._enter(entry)
        self.flush()
        with path.open("rb") as source, self._append() as target:
            _copy(source, target, start, entry.nbytes)
        self._written += entry.nbytes

    def resume(self) -> None:
        """Find what an interrupted run has left; follow it by `keep`, and `cut`."""
        if self._whole.exists() and not self._spool.exists():
            with self._whole.open("rb") as file:
                self._room = int.from_bytes(file.read(8), "little")
        else:
            self._whole.unlink(missing_ok=True)

    def holds(self, entries: Sequence[Entry]) -> bool:
        """Whether an interrupted run has written these parts, behind those that were kept."""
        path, start = self.stored
        start += self._written
        try:
            with path.open("rb") as file:
                file.seek(start)
                return all(_digest(file.read(each.nbytes)) == each.digest for each in entries)
        except OSError:
            return not entries

    def keep(self, entries: Sequence[Entry]) -> None:
        """Go on behind these parts, which are there already."""
        for entry in entries:
            self._entries[entry.key] = entry
            self._written += entry.nbytes

    def cut(self) -> None:
        """Drop what is there beyond what was kept."""
        path, start = self.stored
        if path.exists():
            os.truncate(path, start + self._written)

    def finish(self) -> FileRecord:
        """Write the header, and give the file its name."""
        self.flush()
        digests = "".join(entry.digest for entry in self._entries.values())
        header: dict[str, object] = {"__metadata__": {"format": "pt", "digests": digests}}
        offset = 0
        for entry in self._entries.values():
            offsets = [offset, offset := offset + entry.nbytes]
            header[entry.key] = {
                "dtype": entry.dtype,
                "shape": entry.shape,
                "data_offsets": offsets,
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if 8 + len(text) <= self._room:
            text = text.ljust(self._room - 8)
            with self._whole.open("r+b") as file:
                file.write(len(text).to_bytes(8, "little") + text)
            self._whole.replace(self._path)
        else:
            text += b" " * (-len(text) % 8)
            with self._path.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.flush()
                if offset:
                    path, start = self.stored
                    with path.open("rb") as stored:
                        _copy(stored, file, start, offset)
        self.clear()
        return FileRecord(8 + len(text) + offset, hashlib.sha256(text).hexdigest())

    def flush(self) -> None:
        """Hand over to the disk what is still in the buffer."""
        if self._buffer:
            self._write(self._buffer)
            self._buffer = bytearray()

    def _enter(self, entry: Entry) -> None:
        if entry.key in self._entries:
            raise BundleError(f"{self._path.name}: part '{entry.key}' is written twice")
        self._entries[entry.key] = entry
        size = self._written + len(self._buffer) + entry.nbytes
        if size > _LARGE and not self._room:
            self._settle()

    def _settle(self) -> None:
        """The file is large: leave room for its header, and write its data once from now on."""
        self.flush()
        counts: dict[str, int] = {}
        for key in self._entries:
            name = key.rpartition("/")[0]
            counts[name] = counts.get(name, 0) + 1
        most = max(_PARTS, *counts.values())
        sizes = [len(json.dumps(name, ensure_ascii=False).encode()) for name in self._names]
        room = _ROOM + most * sum(_PER_PART + size for size in sizes)
        self._room = room + -room % _ROOM
        with self._whole.open("wb") as file:
            file.write(self._room.to_bytes(8, "little").ljust(self._room, b"\0"))  # see `resume`
            file.flush()
            if self._written:
                with self._spool.open("rb") as spool:
                    _copy(spool, file, 0, self._written)
        self._spool.unlink(missing_ok=True)

    def _append(self) -> IO[bytes]:
        """The file of the data so far; what an interrupted run left there is overwritten."""
        mode = "ab" if self._written or self._room else "wb"
        return self.stored[0].open(mode)

    def _write(self, data: bytearray | memoryview) -> None:
        with self._append() as file:
            file.write(data)
        self._written += memoryview(data).nbytes


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
            path = local_copy(self.path, self._record.header_sha256)
            with path.open("rb") as file:
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
                str(path), shared=False, size=self._record.bytes, dtype=torch.uint8
            )
            self._index = index
        return self._index

    def _read(self, key: str, device: torch.device | None) -> Tensor:
        start, end, dtype, shape = self._places[key]
        data = self._data[start:end]
        if start % dtype.itemsize:
            data = data.clone()  # as an address that is a multiple of the dtype's size
        tensor = data.view(dtype).view(shape)
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


def _digest(data: memoryview | bytes) -> str:
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
