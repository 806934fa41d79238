"""A file of payload tensors: plain safetensors, written as a stream and checked on reading.

Keys are `<tensor>/<part>` (`/<part>` for what belongs to the whole model). The header's metadata
holds, beside `format: pt`, one string `digests`: the first 8 bytes of each tensor's SHA-256, in
hex, in the order of the data. The header itself is vouched for by the bundle's manifest, so that
any tensor can be read and checked alone; that it is still so when it is read again, the file's
stamp says. The data are in the order in which they were written, without gaps; of large files the
header is padded with spaces, as its room is left before its length is known. Where a codec asks for
it, the small parts of a file that is not large lie in one tensor behind the others
(small_parts.py).
"""

import hashlib
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from msgspec import Meta, Struct
from torch import Tensor

from fusionkit.bundles.small_parts import PACKED, Names
from fusionkit.checkpoints.paths import local_copy
from fusionkit.checkpoints.safetensors_file import (
    SAFETENSORS_DTYPES,
    Header,
    parsed_header,
    tensor_bytes,
)
from fusionkit.checkpoints.steady_file import SteadyFile
from fusionkit.errors import BundleError

_DIGEST = 16
_OPENING = threading.RLock()
"""Held while a header is read. Not a file's own: a bundle can be copied, and a lock can't."""


class FileRecord(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a manifest keeps of a file.

    Attributes:
        bytes: its size.
        header_sha256: of its header.
        packed: whether small parts are packed.
    """

    bytes: Annotated[int, Meta(ge=0, lt=1 << 62)]
    header_sha256: Annotated[str, Meta(max_length=64)]
    packed: bool = False


class Entry(NamedTuple):
    """What a header says of a part: key, safetensors' dtype, shape, bytes, and its digest."""

    key: str
    dtype: str
    shape: list[int]
    nbytes: int
    digest: str


class PartFile:
    """Reads parts from a file, one at a time, each checked against its digest when first read.

    Args:
        path: the file.
        record: what the manifest says of it.
        names: of the tensors that packed parts may be of.

    Raises:
        BundleError: the file is missing or has another size.
    """

    def __init__(self, path: Path, record: FileRecord, names: Names | None = None) -> None:
        self.path = path
        self._record = record
        self._names = names or Names(())
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
        if self._index is not None:
            return self._index
        with _OPENING:
            if self._index is not None:
                return self._index
            with self._reading():
                self._file = SteadyFile(local_copy(self.path, self._record.header_sha256))
                text = self._header()
            if hashlib.sha256(text).hexdigest() != self._record.header_sha256:
                raise self._damaged("its header")
            try:
                index = self._indexed(parsed_header(text, 8 + len(text)))
                if self._record.packed:
                    self._unpack(index)
            except ValueError as error:
                raise BundleError(
                    f"{self.path}: {error}; the file was damaged or tampered with: copy or "
                    "compress it again"
                ) from error
            self._index = index
        return self._index

    def _header(self) -> bytes:
        """The header's text.

        Raises:
            OSError: it is not there.
        """
        length = int.from_bytes(bytes(self._file.read(0, 8).tolist()), "little")
        return self._file.read(8, min(length, self._file.size - 8)).numpy().tobytes()

    def _indexed(self, header: Header) -> dict[str, dict[str, str]]:
        """Where each part lies; the keys of each tensor's parts.

        Raises:
            ValueError: the header is none of a file of parts, or speaks of more than there is.
        """
        digests = header.metadata.get("digests", "")
        if len(digests) != _DIGEST * len(header.tensors):
            raise ValueError("its header has not a digest for each part")
        index: dict[str, dict[str, str]] = {}
        for place, (key, entry) in enumerate(header.tensors.items()):
            start, end = (header.start + offset for offset in entry.data_offsets)
            dtype = SAFETENSORS_DTYPES.get(entry.dtype)
            if dtype is None:
                raise ValueError(f"part '{key}' has dtype {entry.dtype[:32]}, unknown here")
            size = math.prod(entry.shape) * dtype.itemsize
            if end - start != size or end > self._record.bytes:
                raise ValueError(
                    f"part '{key}' has {end - start} bytes, and not {size} in the file"
                )
            if key != PACKED or not self._record.packed:
                name, part = split(key)
                index.setdefault(name, {})[part] = key
            self._places[key] = (start, end, dtype, entry.shape)
            self._digests[key] = digests[place * _DIGEST : (place + 1) * _DIGEST]
        return index

    def _unpack(self, index: dict[str, dict[str, str]]) -> None:
        """Make parts of the pack, as if each had its own entry.

        Raises:
            ValueError: there is no pack, or it is none of this bundle's tensors.
        """
        if PACKED not in self._places:
            raise ValueError("it has no packed parts")
        pack = self._read(PACKED, None)
        before = self._places.pop(PACKED)[0]
        for part, start in self._names.read(tensor_bytes(pack)):
            key = f"{part.tensor}/{part.part}"
            index.setdefault(part.tensor, {})[part.part] = key
            end = before + start + part.nbytes
            self._places[key] = (before + start, end, SAFETENSORS_DTYPES[part.dtype], part.shape)

    def _read(self, key: str, device: torch.device | None) -> Tensor:
        start, end, dtype, shape = self._places[key]
        with self._reading():
            data = self._file.read(start, end - start)
        expected = self._digests.get(key)
        if expected is not None and digest(data.numpy().data) != expected:
            raise self._damaged(f"part '{key}'")
        self._digests.pop(key, None)
        tensor = data.view(dtype).view(shape)
        return tensor if device is None else tensor.to(device)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A context that names the file that can't be read.

        Raises:
            BundleError: it can't.
        """
        try:
            yield
        except OSError as error:
            raise BundleError(
                f"{self.path}: can't be read ({error}); copy or compress it again"
            ) from error

    def _damaged(self, what: str) -> BundleError:
        return BundleError(
            f"{self.path}: {what} is not what was written (SHA-256 differs); the file was damaged "
            "or tampered with: copy or compress it again"
        )


def digest(data: memoryview | bytes) -> str:
    """Of a part: the first 16 hex digits of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:_DIGEST]


def split(key: str) -> tuple[str, str]:
    """The tensor and the part that a key names."""
    tensor, _, part = key.rpartition("/")
    return tensor, part
