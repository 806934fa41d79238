"""A pickle of PyTorch's or Lightning's, read tensor by tensor; no code in it is ever run."""

import math
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusionkit.checkpoints.checkpoint import Checkpoint, reading
from fusionkit.checkpoints.in_memory import check_tensors, shared, specs_of
from fusionkit.checkpoints.paths import is_remote
from fusionkit.checkpoints.steady_file import SteadyFile
from fusionkit.errors import CheckpointError

_WRAPPERS = ("state_dict", "model_state_dict", "model")


class PickleFile(Checkpoint):
    """A `.pt`, `.pth`, `.bin` or `.ckpt` file that holds a state dict, plain or wrapped.

    Tensors stay in the file until they are asked for. One of before torch 1.6, of a machine of the
    other byte order or of a URL is read whole.

    Args:
        path: the file.
        label: how messages call it.

    Raises:
        CheckpointError: it is not whole, or holds more than tensors.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.label, self.files = label, (path,)
        try:
            self._file = None if is_remote(path) else SteadyFile(path)
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read ({error.strerror})") from error
        tensors = _state_dict(path, apart=self._file is not None and _is_apart(path))
        places = {name: _Place.of(tensor) for name, tensor in tensors.items()}
        if any(tensor.is_meta and places[name] is None for name, tensor in tensors.items()):
            tensors, places = _state_dict(path, apart=False), {}
        self._tensors = tensors
        self._places = {name: place for name, place in places.items() if place is not None}
        self.specs = specs_of(tensors)
        self.aliases = {**shared(tensors), **_same(self._places)}
        self.nbytes = path.stat().st_size if self._file is None else self._file.size

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, read from the file.

        Raises:
            KeyError: there is none of this name.
            CheckpointError: it can't be read, or the file was changed since it was opened.
        """
        with reading(self.label, name):
            place = self._places.get(name)
            if place is None or self._file is None:
                return self._tensors[name].detach()
            found = self._file.read(place.start, place.nbytes).view(place.dtype)
            return found.as_strided(place.shape, place.stride)


class _Place(NamedTuple):
    """Where a tensor lies in a file, and how."""

    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "_Place | None":
        """Of a tensor that was left in the file; None of one that has values, or no place there."""
        if not tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            return None
        storage = tensor.untyped_storage()
        start: int | None = getattr(storage, "_checkpoint_offset", None)
        if start is None:
            return None
        shape, stride, dtype = tuple(tensor.shape), tensor.stride(), tensor.dtype
        steps = [(size - 1) * step for size, step in zip(shape, stride, strict=True)]
        nbytes = (sum(steps) + 1) * dtype.itemsize if math.prod(shape) else 0
        inside = int(tensor.storage_offset()) * dtype.itemsize
        if inside + nbytes > storage.nbytes():
            return None
        return cls(start + inside, nbytes, dtype, shape, stride)


def _same(places: Mapping[str, _Place]) -> dict[str, str]:
    """Names whose tensor lies where an earlier name's does (tied weights)."""
    first: dict[_Place, str] = {}
    found = {name: first.setdefault(at, name) for name, at in places.items() if at.nbytes}
    return {name: earlier for name, earlier in found.items() if earlier != name}


def _is_apart(path: Path) -> bool:
    """Whether tensors can be read from a file one by one: they lie in it as they are here."""
    try:
        with zipfile.ZipFile(path) as file:
            order = next((n for n in file.namelist() if n.endswith("/byteorder")), None)
            if order is None:
                return True
            with file.open(order) as said:
                return said.read(16).decode() == sys.byteorder
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False  # of before torch 1.6, or damaged, of which torch says more


def _state_dict(path: Path, apart: bool) -> Mapping[str, Tensor]:
    """What a file holds, by name.

    Args:
        path: the file.
        apart: leave the values in the file: on the meta device, each storage with its offset.
    """
    try:
        loaded = _load_pickle(path, apart)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            is_pickle = file.read(1) in {b"P", b"\x80"}  # else a pointer, a page of HTML, …
        if not is_pickle:
            raise CheckpointError(
                f"{path}: not a PyTorch checkpoint by its first bytes; fetch or save it again"
            ) from error
        said = [line for line in str(error).splitlines() if line and "documentation" not in line]
        reason = said[-1].strip().partition(" Please use")[0]
        raise CheckpointError(
            f"{path}: holds more than tensors, and is not unpickled since that could run code "
            f"from the file ({reason}); save its state dict alone, or as safetensors"
        ) from error
    except Exception as error:  # a damaged pickle can bring up any
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path}: not a whole PyTorch checkpoint ({reason}); fetch or save it again"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: expected a state dict, got {type(loaded).__name__}")
    check_tensors(loaded, str(path))
    return loaded


def _load_pickle(path: Path, apart: bool) -> Any:
    if is_remote(path):
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="meta" if apart else "cpu", weights_only=True)
