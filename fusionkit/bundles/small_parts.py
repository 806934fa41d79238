"""Many small parts as one tensor, `packed`: its index, then their bytes, in the index's order.

A part's entry in a safetensors header takes over a hundred bytes, which is as much as a codec of a
tenth of a bit per parameter stores of a small matrix. In a pack it takes about seven:

    index   count of names of parts, and each as its length and UTF-8;
            count of parts, and each as the tensor's place, the name's place, the dtype's place in
            `DTYPES`, count of sides, and each side

All numbers are unsigned LEB128. A tensor's place is that among the base's names, sorted, from 1 on;
0 is the whole model's.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from fusionkit.checkpoints.safetensors_file import SAFETENSORS_DTYPES

PACKED = "packed"
"""The pack's key; a part's has a `/`."""
DTYPES = (
    *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"),
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "U16", "U32", "U64", "C64"),
)
"""Never reordered: bundles have the places."""


class SmallPart(NamedTuple):
    """What an index says of a part: tensor, part, safetensors' dtype, shape."""

    tensor: str
    part: str
    dtype: str
    shape: list[int]

    @property
    def nbytes(self) -> int:
        """Of its data."""
        return torch.Size(self.shape).numel() * SAFETENSORS_DTYPES[self.dtype].itemsize


class Names:
    """The tensors that packed parts may be of, each with its place in an index.

    Args:
        names: of the base's tensors.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = ["", *sorted(names)]
        self._places = {name: place for place, name in enumerate(self._names)}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def index(self, parts: Sequence[SmallPart]) -> bytes:
        """The index of a pack."""
        names = sorted({part.part for part in parts})
        index = _number(len(names))
        for name in names:
            text = name.encode()
            index += _number(len(text)) + text
        index += _number(len(parts))
        for part in parts:
            numbers = self._places[part.tensor], names.index(part.part), DTYPES.index(part.dtype)
            for number in (*numbers, len(part.shape), *part.shape):
                index += _number(number)
        return bytes(index)

    def read(self, pack: memoryview) -> list[tuple[SmallPart, int]]:
        """The parts of a pack, and where the data of each start in it.

        Raises:
            ValueError: it is no pack, or of other tensors than these.
        """
        numbers = _Numbers(pack)
        names = [numbers.text() for _ in range(numbers.next())]
        parts = []
        for _ in range(numbers.next()):
            tensor, name, dtype, sides = (numbers.next() for _ in range(4))
            if tensor >= len(self._names) or name >= len(names) or dtype >= len(DTYPES):
                raise ValueError("the index of packed parts names what is not there")
            shape = [numbers.next() for _ in range(sides)]
            parts.append(SmallPart(self._names[tensor], names[name], DTYPES[dtype], shape))
        found, start = [], numbers.at
        for part in parts:
            found.append((part, start))
            start += part.nbytes
        if start != len(pack):
            raise ValueError(f"packed parts take {start} bytes, of which {len(pack)} are there")
        return found


class _Numbers:
    """Reads an index, never beyond the pack's end."""

    def __init__(self, pack: memoryview) -> None:
        self._pack, self.at = pack, 0

    def next(self) -> int:
        value = shift = 0
        while True:
            if self.at >= len(self._pack) or shift > 56:
                raise ValueError("the index of packed parts is cut short")
            byte = self._pack[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def text(self) -> str:
        end = self.next() + self.at
        if end > len(self._pack):
            raise ValueError("the index of packed parts is cut short")
        text = bytes(self._pack[self.at : end]).decode()
        self.at = end
        return text


def _number(value: int) -> bytearray:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return found
