"""A file of payload tensors: plain safetensors, written as a stream and checked on reading.

Keys are `<tensor>/<part>` (`/<part>` for what belongs to the whole model). The header's metadata
holds, beside `format: pt`, one string `digests`: the first 8 bytes of each tensor's SHA-256, in
hex, in the order of the data. The header itself is vouched for by the bundle's manifest, so that
any tensor can be read and checked alone, straight from a memory map. The data are in the order in
which they were written, without gaps; of large files the header is padded with spaces, as its
room is left before its length is known. Where a codec asks for it, the small parts of a file that
is not large lie in one tensor behind the others (small_parts.py).
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fusionkit.bundles.small_parts import PACKED, Names
from fusionkit.checkpoints.paths import local_copy
from fusionkit.checkpoints.safetensors_file import SAFETENSORS_DTYPES, tensor_bytes
from fusionkit.errors import BundleError

_DIGEST = 16
_OPENING = threading.RLock()
"""Held while a header is read. Not a file's own: a bundle can be copied, and a lock can't."""


@dataclass(frozen=True)
class FileRecord:
    """What a manifest keeps of a file.

    Attributes:
        bytes: its size.
        header_sha256: of its header.
        packed: whether small parts are packed.
    """

    bytes: int
    header_sha256: str
    packed: bool = False

    def __post_init__(self) -> None:
        kinds = (self.bytes, int), (self.header_sha256, str), (self.packed, bool)
        if not all(isinstance(value, kind) for value, kind in kinds):
            raise ValueError(f"no record of a file: {self}")


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
        path = local_copy(self.path, self._record.header_sha256)
        with _OPENING:
            if self._index is not None:
                return self._index
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                text = file.read(min(length, self._record.bytes))
            if hashlib.sha256(text).hexdigest() != self._record.header_sha256:
                raise self._damaged("its header")
            header = json.loads(text)
            digests = header.pop("__metadata__")["digests"]
            index: dict[str, dict[str, str]] = {}
            for place, (key, entry) in enumerate(header.items()):
                if key != PACKED or not self._record.packed:
                    name, part = split(key)
                    index.setdefault(name, {})[part] = key
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                self._places[key] = (start, end, SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"])
                self._digests[key] = digests[place * _DIGEST : (place + 1) * _DIGEST]
            self._data = torch.from_file(
                str(path), shared=False, size=self._record.bytes, dtype=torch.uint8
            )
            if self._record.packed:
                self._unpack(index)
            self._index = index
        return self._index

    def _unpack(self, index: dict[str, dict[str, str]]) -> None:
        """Make parts of the pack, as if each had its own entry."""
        pack = self._read(PACKED, None)
        before = self._places.pop(PACKED)[0]
        try:
            found = self._names.read(tensor_bytes(pack))
        except ValueError as error:
            raise BundleError(
                f"{self.path}: {error}; the file was damaged or tampered with: copy or compress it "
                "again"
            ) from error
        for part, start in found:
            key = f"{part.tensor}/{part.part}"
            index.setdefault(part.tensor, {})[part.part] = key
            end = before + start + part.nbytes
            self._places[key] = (before + start, end, SAFETENSORS_DTYPES[part.dtype], part.shape)

    def _read(self, key: str, device: torch.device | None) -> Tensor:
        start, end, dtype, shape = self._places[key]
        data = self._data[start:end]
        if start % dtype.itemsize:
            data = data.clone()  # as an address that is a multiple of the dtype's size
        tensor = data.view(dtype).view(shape)
        expected = self._digests.get(key)
        if expected is not None:
            if digest(tensor_bytes(tensor)) != expected:
                raise self._damaged(f"part '{key}'")
            self._digests.pop(key, None)
        return tensor if device is None else tensor.to(device)

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
