"""A task's weights written into a live model, whatever is in it: no copy of the base is kept.

Every tensor that the base or the task has is written, frozen ones as well, in its place: addresses
stay, so that compiled graphs and CUDA graphs stay valid. Only what has another shape (a head of its
own, rows added to a vocabulary) is put anew.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.in_memory import state_of
from fusionkit.checkpoints.live_model import is_sharded
from fusionkit.checkpoints.rounding import Rounding, rounded
from fusionkit.checkpoints.stacks import Stacks, split_tensors
from fusionkit.checkpoints.vocabulary import grown
from fusionkit.errors import BundleError, FusionKitError
from fusionkit.reuse.resizing import put_anew, resize
from fusionkit.reuse.seen import Seen
from fusionkit.reuse.sole_switch import sole_switch
from fusionkit.task_vectors.task_source import write_added, write_weights, written


def become(model: nn.Module, bundle: Bundle, task: str | None) -> list[str]:
    """Make a model a task's; None makes it the base.

    Args:
        model: of the task's class, on any device, in any dtype.
        bundle: its base is read from where it is, one tensor at a time.
        task: one of the bundle's.

    Returns:
        names of the model's tensors that neither the base nor the task has; they are as before.

    Raises:
        BundleError: the bundle has no such task, its base can't be found, a file of it was
            changed, or one of the task's tensors has no place in the model, or is too large for
            the model's dtype; the model is then the base.
        WrongBaseError: the base at hand is another model.
        FusionKitError: the model is sharded, or another thread is switching it.
    """
    if is_sharded(model):
        raise FusionKitError(
            "the model is sharded; switch it by `fusionkit.ReuseModule`, on all ranks together"
        )
    # Weights made under inference mode could never be trained again.
    with sole_switch(model), torch.inference_mode(False), torch.no_grad():
        if task is not None:
            bundle.check([task])
        _ = bundle.base  # found, and the right one, before anything is written
        try:
            return _become(model, bundle, task)
        except BaseException:
            if task is not None:
                _become(model, bundle, None)  # never a mixture of two tasks
            raise


def _become(model: nn.Module, bundle: Bundle, task: str | None) -> list[str]:
    base, label = bundle.whole_base, f"{bundle.label}: task '{task}'"
    own = {} if task is None else dict(bundle.private_tensors(task))
    tied = {*bundle.tied, *base.aliases}
    names = {*own, *(name for name in base if name not in tied)}
    seen = Seen(model, bundle, frozenset(names))
    if lacking := [name for name in own if seen.live_name(name) not in state_of(model)]:
        raise BundleError(
            f"{label}: its own tensor '{lacking[0]}' has no place in {type(model).__name__}; the "
            "task may be of another class: load it by fusionkit.load"
        )
    _resize(model, bundle, task, seen)
    done = {*own}
    if task is not None:
        out = seen.state
        write_weights(bundle, task, base, out, seen.apart)
        write_added(bundle, task, out, seen.apart)
        done |= {*written(bundle)}
    split_base = bundle.base.plain
    left = [name for name in split_base if name not in done and name not in tied]
    _write(model, seen, bundle.stacks, ((name, split_base[name]) for name in left), label)
    _write(model, seen, {}, own.items(), label)
    places = {seen.live_name(name) for name in (*names, *seen.apart)}
    state = state_of(model)
    filled = {state[name].data_ptr() for name in places if name in state}
    return [name for name, t in state.items() if t.numel() and t.data_ptr() not in filled]


def _resize(model: nn.Module, bundle: Bundle, task: str | None, seen: Seen) -> None:
    """Have room for the rows that a task adds to the vocabulary; those of another one go."""
    changed = {name for each in bundle.tasks for name in bundle.added(each)}
    rows: Mapping[str, int] = {} if task is None else bundle.added(task)
    base = bundle.whole_base
    shapes = {name: grown(base.specs[name].shape, rows.get(name, 0)) for name in changed}
    resize(model, seen.places(shapes))


def _write(
    model: nn.Module, seen: Seen, stacks: Stacks, tensors: Iterable[tuple[str, Tensor]], label: str
) -> None:
    """Write tensors as they are, whatever shapes were there."""
    rounding = Rounding()
    state = split_tensors(seen.state, stacks)
    for name, value in tensors:
        for place in (name, *(alias for alias, to in seen.apart.items() if to == name)):
            if place not in state:
                continue
            if state[place].shape == value.shape:
                rounding.write(place, state[place], value)
            else:
                old = state[place]
                what = f"{label}: tensor '{place}'"
                fresh = rounded(value, old.dtype, what).to(old.device)
                put_anew(model, [seen.live_name(place)], fresh)
                state = split_tensors(seen.state, stacks)
    rounding.check(label)
