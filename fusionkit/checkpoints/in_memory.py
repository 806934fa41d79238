"""Tensors in memory: a mapping's own, and copies of any checkpoint's."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusionkit.checkpoints.checkpoint import Checkpoint, TensorSpec, reading
from fusionkit.errors import CheckpointError, listing


class TensorMapping(Checkpoint):
    """A mapping of tensors, as it is: what changes there changes here.

    Args:
        tensors: by name.

    Raises:
        CheckpointError: it holds more than tensors.
    """

    live = True

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.label = f"{type(tensors).__name__} of tensors in memory"
        check_tensors(tensors, self.label)
        self._tensors = tensors
        self.specs = specs_of(tensors)
        self.aliases = shared(tensors)
        self.nbytes = bytes_of(tensors, self.aliases)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor itself."""
        with reading(self.label, name):
            return self._tensors[name].detach()


class Copied(Checkpoint):
    """A copy of another checkpoint, which stays as it is; tied tensors stay tied.

    Args:
        source: what is copied.
        device: where to; by default each tensor stays where it is.
    """

    def __init__(self, source: Checkpoint, device: torch.device | None = None) -> None:
        self.label, self.buffers = source.label, source.buffers
        self.specs, self.aliases = source.specs, source.aliases
        self.strip_prefix, self.add_prefix = source.strip_prefix, source.add_prefix
        own: dict[str, Tensor] = {}
        for name in source:
            if name not in source.aliases:
                tensor = source[name]
                own[name] = tensor.to(device or tensor.device, copy=True)
        self._tensors = {name: own[source.aliases.get(name, name)] for name in source}
        self.nbytes = bytes_of(self._tensors, self.aliases)

    def __getitem__(self, name: str) -> Tensor:
        """The copy itself."""
        with reading(self.label, name):
            return self._tensors[name].detach()


def check_tensors(tensors: Mapping[str, object], label: str) -> None:
    """Check that a mapping holds tensors alone.

    Raises:
        CheckpointError: it does not; the message names what else it holds.
    """
    wrong = [
        f"'{name}': {type(value).__name__}"
        for name, value in tensors.items()
        if not isinstance(value, Tensor)
    ]
    if wrong:
        raise CheckpointError(f"{label}: expected tensors by name, got{listing(wrong)}")


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Their shapes and dtypes."""
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def bytes_of(tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> int:
    """Their bytes, tied ones once."""
    return sum(tensor.nbytes for name, tensor in tensors.items() if name not in aliases)


def shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names whose tensor is, to the byte, the one that an earlier name has (tied weights)."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.device.type == "meta":
            continue
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        target = first.setdefault(place, name)
        if target != name:
            aliases[name] = target
    return aliases
