"""Writes a file of payload tensors as a stream; part_file.py reads it, and says what is in it."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, NamedTuple

from torch import Tensor

from fusionkit.bundles.part_file import Entry, FileRecord, digest, split
from fusionkit.bundles.small_parts import PACKED, Names, SmallPart
from fusionkit.checkpoints.safetensors_file import SAFETENSORS_DTYPES, tensor_bytes
from fusionkit.codecs.overhead import SMALL
from fusionkit.errors import BundleError

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_BUFFERED = 256 * 1024
_LARGE = 1 << 26
"""Bytes of data from which a file is no longer written twice."""
_PARTS, _PER_PART, _ROOM = 4, 140, 4096
"""A tensor's parts, and bytes of each in a header beside its name, that room is left for."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        return cls(Entry(key, dtype, list(tensor.shape), data.nbytes, digest(data)), data)


class PartWriter:
    """Writes a file of parts, one after the other; memory stays at one buffer of 256 KiB.

    A safetensors header comes first and is not known before the last part. Until `finish` a small
    file's data are in a spool beside it; a large file's are where they belong, behind room for the
    header. What the file looks like depends on the parts and their order alone.

    Args:
        path: the file; it appears only with `finish`.
        names: the tensors that parts may be of, to leave room for.
        packed: those whose small parts are packed, unless the file is large; all of a pack are in
            memory once.
    """

    def __init__(self, path: Path, names: Iterable[str] = (), packed: Names | None = None) -> None:
        self._path = path
        self._spool = path.with_name(path.name + ".spool")
        self._whole = path.with_name(path.name + ".whole")
        self._names = names
        self._packed = packed
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
                return all(digest(file.read(each.nbytes)) == each.digest for each in entries)
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
        own: list[tuple[Entry, int]] = []
        small: list[tuple[Entry, int]] = []
        size = 0
        for entry in self._entries.values():
            (small if self._is_small(entry) else own).append((entry, size))
            size += entry.nbytes
        entries, pack = [entry for entry, _ in own], self._pack(small)
        if pack:
            entries.append(Entry(PACKED, "U8", [len(pack)], len(pack), digest(pack)))
        text = _header(entries)
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
                self._copy(own, file)
                file.write(pack)
        self.clear()
        written = 8 + len(text) + sum(entry.nbytes for entry in entries)
        return FileRecord(written, hashlib.sha256(text).hexdigest(), bool(pack))

    def flush(self) -> None:
        """Hand over to the disk what is still in the buffer."""
        if self._buffer:
            self._write(self._buffer)
            self._buffer = bytearray()

    def _is_small(self, entry: Entry) -> bool:
        if self._packed is None or self._room:
            return False
        return entry.nbytes < SMALL and split(entry.key)[0] in self._packed

    def _pack(self, small: list[tuple[Entry, int]]) -> bytes:
        if not small or self._packed is None:
            return b""
        parts = [SmallPart(*split(entry.key), entry.dtype, entry.shape) for entry, _ in small]
        file = BytesIO(self._packed.index(parts))
        self._copy(small, file)
        return file.getvalue()

    def _copy(self, entries: list[tuple[Entry, int]], target: IO[bytes]) -> None:
        """Append parts that are written, each from where it starts, to another file."""
        if entries:
            path, before = self.stored
            with path.open("rb") as source:
                for entry, start in entries:
                    _copy(source, target, before + start, entry.nbytes)

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
            name, _ = split(key)
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


def _header(entries: Sequence[Entry]) -> bytes:
    digests = "".join(entry.digest for entry in entries)
    header: dict[str, object] = {"__metadata__": {"format": "pt", "digests": digests}}
    offset = 0
    for entry in entries:
        offsets = [offset, offset := offset + entry.nbytes]
        header[entry.key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


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
