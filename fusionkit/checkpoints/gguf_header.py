"""The header of a GGUF file, held to the file's size before the package gguf reads it.

That package maps what it reads, believes what a header says of itself, and takes a step for each
entry of a list. So the header is walked through here first, and gguf is given a copy of it alone,
in a file that nobody else has, as long as the whole one but with nothing behind the header.
"""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fusionkit.checkpoints.safetensors_file import MOST_IN_FILE
from fusionkit.checkpoints.steady_file import SteadyFile

_LONGEST = 256 << 20
"""Bytes of a header; vocabularies are in it."""
_MOST_KEYS = 1 << 16
_MOST_ENTRIES = 1 << 22
"""Of all lists together; of the largest vocabularies there is half a million of everything."""
_MOST_AXES = 4
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a number, by the type that the format numbers."""
_STRING, _LIST = 8, 9
_PIECE = 1 << 20


@contextmanager
def header_alone(file: SteadyFile) -> Iterator[Path]:
    """A file of the same header and length, for as long as the context is.

    Args:
        file: the GGUF file.

    Raises:
        ValueError: its header is malformed, or says otherwise than the file's size.
        OSError: it can't be read.
    """
    end = _Header(file).end
    with TemporaryDirectory(prefix="fusionkit-") as folder:
        path = Path(folder) / "header.gguf"
        with path.open("wb") as copy:
            for start in range(0, end, _PIECE):
                copy.write(file.read(start, min(_PIECE, end - start)).numpy().tobytes())
            copy.truncate(file.size)  # a hole, which takes no room
        yield path


class _Header:
    """A walk through a header, which ends at `end`."""

    def __init__(self, file: SteadyFile) -> None:
        self._file, self._held, self._from, self.end = file, b"", 0, 0
        magic, version = self._take(4), self._take(4)
        self._order = "<" if int.from_bytes(version, "little") & 0xFFFF else ">"
        if magic != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > MOST_IN_FILE or keys > _MOST_KEYS:
            raise ValueError(
                f"its header says {tensors:,} tensors and {keys:,} keys, and may have "
                f"{MOST_IN_FILE:,} and {_MOST_KEYS:,}"
            )
        self._entries, alignment = 0, 32
        for _ in range(keys):
            key, kind = self._text(), self._number("I")
            start = self.end
            self._value(kind)
            if key == b"general.alignment" and kind == 4:
                alignment = struct.unpack(self._order + "I", self._back(start, 4))[0]
        ends = [self._tensor() for _ in range(tensors)]
        data = self.end + -self.end % max(alignment, 1)
        if data + max(ends, default=0) > file.size:
            raise ValueError(
                f"its tensors end at byte {data + max(ends)}, and it has {file.size}; it was cut "
                "short"
            )

    def _value(self, kind: int) -> None:
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _STRING:
            self._text()
        elif kind == _LIST:
            kind, count = self._number("I"), self._number("Q")
            self._entries += count
            if self._entries > _MOST_ENTRIES:
                raise ValueError(f"lists in its header have more than {_MOST_ENTRIES:,} entries")
            if kind == _STRING:
                for _ in range(count):
                    self._skip(self._number("Q"))
            elif kind in _SIZES:
                self._skip(count * _SIZES[kind])
            else:
                raise ValueError(f"a list of values of type {kind} in its header is not known")
        else:
            raise ValueError(f"a value of type {kind} in its header is not known")

    def _tensor(self) -> int:
        """Where the next tensor ends, in bytes of the data."""
        import gguf

        name, axes = self._text(), self._number("I")
        if axes > _MOST_AXES:
            raise ValueError(f"a tensor has {axes} axes, and may have {_MOST_AXES}")
        shape = [self._number("Q") for _ in range(axes)]
        kind, offset = self._number("I"), self._number("Q")
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        if shape and shape[0] % block:
            raise ValueError(f"{name[:99]!r} has rows of {shape[0]}, which {block} does not divide")
        return offset + math.prod(shape) // block * size

    def _text(self) -> bytes:
        return self._take(self._number("Q"))

    def _number(self, kind: str) -> int:
        found: int = struct.unpack(self._order + kind, self._take(struct.calcsize(kind)))[0]
        return found

    def _skip(self, size: int) -> None:
        self.end += size
        if self.end > min(self._file.size, _LONGEST):
            raise ValueError(f"its header goes on after byte {min(self._file.size, _LONGEST)}")

    def _take(self, size: int) -> bytes:
        start = self.end
        self._skip(size)
        return self._back(start, size)

    def _back(self, start: int, size: int) -> bytes:
        """Bytes that were walked over."""
        if start < self._from or start + size > self._from + len(self._held):
            count = min(max(size, _PIECE), self._file.size - start)
            self._held, self._from = self._file.read(start, count).numpy().tobytes(), start
        return self._held[start - self._from : start - self._from + size]
