"""A safetensors file of a whole model, written as a stream: of the model, one tensor is in memory.

The header comes first and is not known before the last tensor, and a reader wants every tensor at
a multiple of its entries' size: so the data go to a file for each size, which are joined, the
largest first, behind the header.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from torch import Tensor

from fusionkit.checkpoints.safetensors_file import SAFETENSORS_DTYPES, tensor_bytes
from fusionkit.errors import BundleError

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_CHUNK = 1 << 22


def write_model_file(
    tensors: Iterable[tuple[str, Tensor]], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write tensors as they come.

    Args:
        tensors: name and tensor, on the CPU.
        path: the file; what is not whole yet is beside it, in a hidden folder.
        metadata: of the file's header.

    Raises:
        OSError: it can't be written.
        BundleError: safetensors has no such dtype.
    """
    with TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        spools: dict[int, IO[bytes]] = {}
        entries: dict[int, list[tuple[str, dict[str, Any], int]]] = {}
        try:
            for name, tensor in tensors:
                if tensor.dtype not in _NAMES:
                    raise BundleError(f"tensor '{name}' is {tensor.dtype}, unknown to safetensors")
                size = tensor.dtype.itemsize
                if size not in spools:
                    spools[size], entries[size] = (Path(folder) / str(size)).open("w+b"), []
                data = tensor_bytes(tensor.contiguous())
                spools[size].write(data)
                own = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
                entries[size].append((name, own, tensor.nbytes))
            with path.open("wb") as file:
                file.write(_header(entries, metadata))
                for size in sorted(spools, reverse=True):
                    spools[size].seek(0)
                    shutil.copyfileobj(spools[size], file, _CHUNK)
                    spools[size].truncate(0)
        finally:
            for spool in spools.values():
                spool.close()


def _header(
    entries: Mapping[int, list[tuple[str, dict[str, Any], int]]], metadata: Mapping[str, str]
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for size in sorted(entries, reverse=True):
        for name, own, nbytes in entries[size]:
            header[name] = {**own, "data_offsets": [at, at + nbytes]}
            at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
