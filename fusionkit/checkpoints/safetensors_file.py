"""A safetensors file, read tensor by tensor or in pieces: only what was read is in memory.

Its header is held to the format before anything is made of it: sizes, offsets without gaps or
overlaps, at most so many bytes and tensors.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor

from fusionkit.checkpoints.checkpoint import (
    MOST_TENSORS,
    Checkpoint,
    Pieces,
    TensorSpec,
    reading,
)
from fusionkit.checkpoints.paths import is_remote, network_errors
from fusionkit.checkpoints.steady_file import SteadyFile
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


_LONGEST = 100 << 20
"""Bytes of a header, as safetensors has it."""

Size = Annotated[int, Meta(ge=0, lt=1 << 62)]


class HeaderEntry(Struct, frozen=True):
    """What a header says of a tensor."""

    dtype: str
    shape: Annotated[list[Size], Meta(max_length=32)]
    data_offsets: tuple[Size, Size]


class Header(NamedTuple):
    """A file's header.

    Attributes:
        tensors: what it says of each, in the file's order of names.
        metadata: the texts that it has beside.
        start: where the data start in the file.
    """

    tensors: Mapping[str, HeaderEntry]
    metadata: Mapping[str, str]
    start: int


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
            self._file = None if is_remote(path) else SteadyFile(path)
            with network_errors():
                self.nbytes = path.stat().st_size if self._file is None else self._file.size
            header = _header(path, self._file, self.nbytes)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); fetch or save it again"
            ) from error
        specs: dict[str, TensorSpec] = {}
        self._starts: dict[str, int] = {}
        for name, entry in header.tensors.items():
            if entry.dtype not in SAFETENSORS_DTYPES:
                raise CheckpointError(
                    f"{path}: tensor '{name}' has dtype {entry.dtype[:32]}, unknown here"
                )
            specs[name] = TensorSpec(tuple(entry.shape), SAFETENSORS_DTYPES[entry.dtype])
            self._starts[name] = header.start + entry.data_offsets[0]
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
        if self._file is not None:
            with suppress(OSError):  # is met again, and reported, when the tensor is read
                self._file.read_ahead(self._starts[name], self.specs[name].nbytes)

    def pieces(self, name: str) -> Pieces:
        """A tensor, to be read in pieces.

        Raises:
            CheckpointError: it can't be read, or the file was changed since it was opened.
        """
        with reading(self.label, name):
            pieces = self._pieces(name)

        def read(place: slice) -> Tensor:
            with reading(self.label, name):
                return pieces(place)

        return read

    def _pieces(self, name: str) -> "_Pieces":
        file = _RemoteFile(self._path) if self._file is None else self._file
        return _Pieces(file, self._starts[name], self.specs[name].dtype)


class _Pieces:
    """Reads parts of one tensor into memory that is used again."""

    def __init__(self, file: "SteadyFile | _RemoteFile", start: int, dtype: torch.dtype) -> None:
        self._file, self._start, self._dtype = file, start, dtype
        self._memory = torch.empty(0, dtype=dtype)

    def __call__(self, place: slice) -> Tensor:
        count = place.stop - place.start
        if count > len(self._memory):
            self._memory = torch.empty(count, dtype=self._dtype)
        values = self._memory[:count]
        memory = values.view(torch.uint8).numpy().data
        self._file.read_into(memory, self._start + place.start * self._dtype.itemsize)
        return values


class _RemoteFile:
    """A remote file, open for as long as this is kept."""

    def __init__(self, path: Path) -> None:
        with network_errors():
            self._file: Any = path.open("rb")

    def read_into(self, memory: memoryview, start: int) -> None:
        """Fill memory with the bytes from an offset on.

        Raises:
            OSError: they can't be read.
        """
        self._file.seek(start)
        while memory.nbytes:
            with network_errors():
                read = int(self._file.readinto(memory))
            if not read:
                raise OSError("the file was cut short after it was opened")
            memory = memory[read:]


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself: the texts under `__metadata__` in its header.

    Raises:
        CheckpointError: it is no such file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return dict(parsed_header(file.read(min(length, _LONGEST)), 8 + length).metadata)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); fetch or save it again"
        ) from error


def _header(path: Path, steady: SteadyFile | None, size: int) -> Header:
    """A file's header, of which all must be there that it says.

    Raises:
        ValueError: it is malformed, or says otherwise than the file's size.
        OSError: it can't be read.
    """
    file = _RemoteFile(path) if steady is None else steady
    length = int.from_bytes(_bytes(file, 0, 8), "little")
    if length > min(size - 8, _LONGEST):
        raise ValueError("its header is longer than the file")
    text = _bytes(file, 8, length)
    header = parsed_header(text, 8 + length)
    end = 0
    for name, entry in sorted(header.tensors.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        dtype = SAFETENSORS_DTYPES.get(entry.dtype)
        if dtype and stop - start != TensorSpec(tuple(entry.shape), dtype).nbytes:
            raise ValueError(f"'{name}' has another size than its shape says")
        if start != end or stop < start:
            raise ValueError(f"'{name}' starts at byte {start} of the data, and not at {end}")
        end = stop
    if header.start + end != size:
        raise ValueError(f"it should have {header.start + end} bytes and has {size}")
    return header


def parsed_header(text: bytes, start: int) -> Header:
    """What a header's text says.

    Args:
        text: JSON.
        start: where the data start in the file.

    Raises:
        ValueError: it is malformed, or names more tensors than any model has.
    """
    if text.count(b'"data_offsets"') > MOST_TENSORS:
        raise ValueError(f"its header names more than {MOST_TENSORS:,} tensors")
    try:
        content = msgspec.json.decode(text)
        if not isinstance(content, dict):
            raise ValueError("its header is no object")  # noqa: TRY004
        metadata = msgspec.convert(content.pop("__metadata__", {}), dict[str, str])
        return Header(msgspec.convert(content, dict[str, HeaderEntry]), metadata, start)
    except RecursionError as error:
        raise ValueError("its header is nested without end") from error


def _bytes(file: SteadyFile | _RemoteFile, start: int, size: int) -> bytes:
    found = bytearray(size)
    file.read_into(memoryview(found), start)
    return bytes(found)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values, in row-major order; its own memory where it can be."""
    # Through uint8, since NumPy knows no bfloat16; clones nothing that is contiguous already.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
