"""A pickle of PyTorch's or Lightning's, memory-mapped; no code in it is ever run."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionkit.checkpoints.checkpoint import Checkpoint, reading
from fusionkit.checkpoints.in_memory import check_tensors, shared, specs_of
from fusionkit.checkpoints.paths import is_remote
from fusionkit.errors import CheckpointError

_WRAPPERS = ("state_dict", "model_state_dict", "model")


class PickleFile(Checkpoint):
    """A `.pt`, `.pth`, `.bin` or `.ckpt` file that holds a state dict, plain or wrapped.

    Args:
        path: the file.
        label: how messages call it.

    Raises:
        CheckpointError: it is not whole, or holds more than tensors.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.label, self.files = label, (path,)
        self._tensors = _state_dict(path)
        self.specs = specs_of(self._tensors)
        self.aliases = shared(self._tensors)
        self.nbytes = path.stat().st_size

    def __getitem__(self, name: str) -> Tensor:
        """A tensor in the file's memory map."""
        with reading(self.label, name):
            return self._tensors[name].detach()


def _state_dict(path: Path) -> Mapping[str, Tensor]:
    try:
        loaded = _load_pickle(path)
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


def _load_pickle(path: Path) -> Any:
    if is_remote(path):
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # Files older than torch 1.6 can't be memory-mapped.
        return torch.load(path, map_location="cpu", weights_only=True)
