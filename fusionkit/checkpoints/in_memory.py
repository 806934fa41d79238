"""Tensors in memory: a live model's, or a mapping's."""

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor, nn

from fusionkit.checkpoints.architecture import Architecture, unsaved
from fusionkit.checkpoints.checkpoint import Checkpoint, TensorSpec, bytes_of, reading
from fusionkit.checkpoints.names import unwrapped
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


class LiveModel(Checkpoint):
    """A model in memory, as it is: what changes there changes here.

    Args:
        model: the model.

    Raises:
        CheckpointError: its state holds more than tensors.
    """

    live = True

    def __init__(self, model: nn.Module) -> None:
        self.label = f"{type(model).__name__} (module in memory)"
        self._tensors = state_of(model)
        check_tensors(self._tensors, self.label)
        self.specs = specs_of(self._tensors)
        self.aliases = shared(self._tensors)
        buffers = unwrapped(name for name, _ in model.named_buffers(remove_duplicate=False))
        self.buffers = frozenset(name for name in buffers if name in self.specs)
        self.nbytes = bytes_of(self._tensors, self.aliases)
        self._model = model

    def __getitem__(self, name: str) -> Tensor:
        """The model's tensor itself."""
        with reading(self.label, name):
            return self._tensors[name].detach()

    @property
    def on_meta(self) -> bool:
        """Whether any of the model's tensors has no values."""
        return any(tensor.is_meta for tensor in self._tensors.values())

    @cached_property
    def architecture(self) -> Architecture:  # type: ignore[override]
        """What the model's class says of itself."""
        known = Architecture.of(self._model)
        names = unwrapped(known.shapes)
        return known if all(n == there for n, there in names.items()) else known.renamed(names)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's own tensors, by every name; without what torch.compile and FSDP put into names.

    Those that its class never saves, as it makes them itself, are left out.
    """
    state: dict[str, Tensor] = model.state_dict()
    own = unsaved(model)
    return {n: state[there] for n, there in unwrapped(state).items() if there not in own}


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has one of a model's tensors, and what it is called there.

    Args:
        model: the model.
        name: the tensor's, as `state_of` has it.
    """
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:  # there are wrappers on the way
        module = None
    if module is None or (leaf not in module._parameters and leaf not in module._buffers):
        path, _, leaf = unwrapped(model.state_dict())[name].rpartition(".")
        module = model.get_submodule(path)
    return module, leaf


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
