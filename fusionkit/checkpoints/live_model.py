"""A live model as a place of weights: sharded, tied, on the meta device; a base loaded into it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fusionkit.checkpoints.checkpoint import Checkpoint, Source, matches, same_values
from fusionkit.checkpoints.conformed import conformed
from fusionkit.checkpoints.in_memory import LiveModel, owner_of
from fusionkit.checkpoints.names import prefix_over
from fusionkit.checkpoints.quantized import unquantized
from fusionkit.errors import FusionKitError


def is_sharded(model: nn.Module) -> bool:
    """Whether any of the model's tensors is spread over several processes."""
    return any(isinstance(tensor, DTensor) for tensor in model.state_dict().values())


def on_meta(model: nn.Module) -> bool:
    """Whether the model was built on the meta device, without weights."""
    return any(tensor.is_meta for tensor in model.state_dict().values())


def aliases(model: nn.Module) -> dict[str, str]:
    """Tied name → name of the tensor that it shares, also where a tensor has no memory of its own.

    `LiveModel.aliases` compares addresses, which sharded tensors and those on the meta device
    lack.
    """
    if not (is_sharded(model) or on_meta(model)):
        return dict(LiveModel(model).aliases)
    first: dict[int, str] = {}
    named = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    known = {name: first.setdefault(place, name) for name, place in named.items()}
    return {name: target for name, target in known.items() if target != name}


def untie(model: nn.Module, names: Sequence[str]) -> None:
    """Give tensors of their own to some of a model's names that share one.

    Args:
        model: the model.
        names: as `state_of` has them.

    Raises:
        FusionKitError: the model is sharded.
    """
    if names and is_sharded(model):
        raise FusionKitError(
            f"'{names[0]}' shares its tensor in the model, which is sharded, and has one of its "
            "own in the checkpoint; build the model with tie_word_embeddings=False, or leave it "
            "unsharded"
        )
    for name in names:
        module, leaf = owner_of(model, name)
        old = getattr(module, leaf)
        with torch.inference_mode(False), torch.no_grad():
            fresh = old.detach().clone()
        if leaf in module._parameters:
            fresh = nn.Parameter(fresh, requires_grad=old.requires_grad)
        setattr(module, leaf, fresh)


def put(target: Tensor, value: Tensor) -> None:
    """Copy a tensor, whole or sharded as the target is, into one that may be sharded."""
    target.copy_(part(value, target) if isinstance(target, DTensor) else value)


def part(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor, cut and placed as another is; nothing is sent."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value.to(like.device)
    value = value.detach().to(like.device).contiguous()
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def open_for(model: nn.Module, source: Source) -> Checkpoint:
    """Open the weights of a model; what the file does not say of its class, the model does.

    A file of another class than the model's, as that of a bare encoder is of a classifier, is seen
    as the model's class reads it.

    Args:
        model: the model.
        source: anything that `Checkpoint.of` reads.
    """
    opened, known = Checkpoint.of(source), LiveModel(model).architecture
    if opened.architecture is None:
        return conformed(opened, known)
    if any(name in opened for name in known.shapes):
        return opened
    seen = conformed(opened.as_stored, known)
    return seen if any(name in seen for name in known.shapes) else opened


def load_base(model: nn.Module, base: Checkpoint, private: list[str]) -> None:
    """Load a base's weights into a model, in place; what the base lacks must be private.

    A model on the meta device is checked, and not filled.

    Raises:
        FusionKitError: the base lacks a tensor of the model, or has it in another shape; or it is
            quantised.
    """
    base, state = unquantized(base), model.state_dict()
    tied = aliases(model)
    apart = [
        alias
        for alias, name in tied.items()
        if alias in base and name in base and not same_values(base, alias, base, name)
    ]
    if apart:  # else the one would be written over the other
        untie(model, apart)
        state, tied = model.state_dict(), aliases(model)
    missing = [
        name
        for name in state
        if name not in base and tied.get(name) not in base and not matches(name, private)
    ]
    if missing:
        mend = "declare it private if it is each task's own"
        if prefix := prefix_over(list(state), base):
            mend = f"give the base as Checkpoint.of(…, strip_prefix='{prefix}')"
        elif prefix := prefix_over(base, state):
            mend = f"give the base as Checkpoint.of(…, add_prefix='{prefix}')"
        raise FusionKitError(
            f"{base.label} lacks '{missing[0]}' ({len(missing)} such tensors) of the model "
            f"{type(model).__name__}; its names begin like '{min(base)}': {mend}"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            if name in base and not matches(name, private):
                if base.specs[name].shape != tuple(tensor.shape):
                    raise FusionKitError(
                        f"{base.label}: '{name}' has shape {list(base.specs[name].shape)}, the "
                        f"model wants {list(tensor.shape)}"
                    )
                if not tensor.is_meta:
                    put(tensor, base[name])
