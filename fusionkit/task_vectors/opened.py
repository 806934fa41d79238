"""A base and its fine-tuned models, opened so that one name means one tensor in all of them.

Folders, bare files, live models and adapters call a model's tensors by different names. What is
known of the model's class (`Architecture`) comes from whichever of them says it, the base first,
and is applied to those that don't; a wrapper's `module.` and a user's own `rename` and `ignore`
do the rest.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from fusionkit.checkpoints.adapters.adapter import Adapter
from fusionkit.checkpoints.adapters.finding import (
    as_adapter,
    factors_in,
    open_base,
    open_finetuned,
)
from fusionkit.checkpoints.adapters.merged import MergedAdapter
from fusionkit.checkpoints.adapters.modules import Adapters, AdapterSpace, open_space
from fusionkit.checkpoints.architecture import Architecture
from fusionkit.checkpoints.checkpoint import Checkpoint, Source, matches
from fusionkit.checkpoints.conformed import conformed, with_ties
from fusionkit.checkpoints.headed import Headed
from fusionkit.checkpoints.in_memory import LiveModel
from fusionkit.checkpoints.names import matched, prefix_over, replaced
from fusionkit.checkpoints.quantized import unquantized
from fusionkit.checkpoints.stacks import unsplit
from fusionkit.checkpoints.view import View
from fusionkit.checkpoints.view import renamed as prefixed
from fusionkit.checkpoints.with_head import WithHead
from fusionkit.errors import CheckpointError


class Opened(NamedTuple):
    """A family's checkpoints, under the same names.

    Attributes:
        base: the base's.
        finetuned: task name → checkpoint.
        space: how adapters' own tensors make the base's weights; None where they are merged.
    """

    base: Checkpoint
    finetuned: dict[str, Checkpoint]
    space: AdapterSpace | None


def open_models(
    base: Source | Checkpoint,
    finetuned: Mapping[str, Source | Checkpoint],
    adapters: Adapters,
    rename: Mapping[str, str],
    ignore: Sequence[str],
) -> Opened:
    """Open a base and its fine-tuned models; arguments as of `Family`.

    Raises:
        CheckpointError: one can't be read, is quantised, is an adapter that is not read, or an
            adapter given as the base; or `rename` gives two of a checkpoint's tensors one name.
        FamilyError: an adapter does not fit the base.
    """
    bare = {t: each.model if isinstance(each, Headed) else each for t, each in finetuned.items()}
    opened = _opened(base, bare, adapters, rename, ignore)
    for task, each in finetuned.items():
        if isinstance(each, Headed):
            model = opened.finetuned[task]
            opened.finetuned[task] = WithHead(model, Checkpoint.of(each.head))
    return opened


def _opened(
    base: Source | Checkpoint,
    finetuned: Mapping[str, Source | Checkpoint],
    adapters: Adapters,
    rename: Mapping[str, str],
    ignore: Sequence[str],
) -> Opened:
    """The same, of models without heads from elsewhere."""
    start = unquantized(unsplit(open_base(base)))
    _refuse_empty(start)
    merged = finetuned if adapters == "merged" else {}
    found = {task: open_finetuned(source) for task, source in merged.items()}
    whole = {
        task: unquantized(each, task)
        for task, each in found.items()
        if not isinstance(each, Adapter) and not factors_in(each, start)
    }
    for model in whole.values():
        _refuse_empty(model)
    known = next((c.architecture for c in (start, *whole.values()) if c.architecture), None)

    def fitted(checkpoint: Checkpoint, wanted: Collection[str], shorter: bool) -> Checkpoint:
        if checkpoint.architecture is None and known is not None:
            checkpoint = conformed(checkpoint, known)
        elif known is not None and not any(name in wanted for name in checkpoint):
            checkpoint = _within(checkpoint, known, wanted, is_base=shorter)
        return renamed(checkpoint, wanted, rename, ignore, shorter)

    start = fitted(start, next(iter(whole.values()), ()), shorter=True)
    if known is None:  # a head that only fine-tuned files hold, tied by its bytes
        start = with_ties(start, {a: n for each in whole.values() for a, n in each.aliases.items()})
    if adapters == "modules":
        return Opened(*open_space(start, finetuned))
    opened = {
        task: fitted(whole[task], start, shorter=False) if task in whole else _merged(each, start)
        for task, each in found.items()
    }
    return Opened(start, opened, None)


def _within(
    checkpoint: Checkpoint, known: Architecture, wanted: Collection[str], is_base: bool
) -> Checkpoint:
    """A model of another class than the one that is known, which may be a part of it.

    So is a bare encoder of a classifier, whose own tensors have a prefix; or, fine-tuned, one tower
    of a base of two. A base keeps its names: fine-tuned files are brought to these.
    """
    seen = conformed(checkpoint.as_stored, known)
    if any(name in wanted for name in seen):
        return seen
    if is_base:
        return checkpoint
    prefix = prefix_over(list(checkpoint), wanted)
    return prefixed(checkpoint, "", prefix) if prefix else checkpoint


def _refuse_empty(model: Checkpoint) -> None:
    if isinstance(model, LiveModel) and model.on_meta:
        raise CheckpointError(
            f"{model.label}: is on the meta device and has no weights; give the folder or file "
            "that they are in, or load them into the model first"
        )


def renamed(
    checkpoint: Checkpoint,
    wanted: Collection[str],
    rename: Mapping[str, str],
    ignore: Sequence[str],
    shorter: bool = False,
) -> Checkpoint:
    """See a checkpoint under a user's names, without what no one needs.

    Args:
        checkpoint: the checkpoint.
        wanted: another's names, which it gets where only a wrapper's `module.` tells them apart.
        rename: regular expression → replacement.
        ignore: patterns of the tensors that are left out.
        shorter: as of `matched`.
    """
    if rename and checkpoint.rename == rename:
        rename = {}  # it was done
    names = replaced(checkpoint, rename, checkpoint.label)
    names = {new: names[name] for new, name in matched(names, wanted, shorter).items()}
    seen = {name: there for name, there in names.items() if not matches(name, ignore)}
    if all(name == there for name, there in names.items()) and len(seen) == len(names):
        return checkpoint
    view = View(checkpoint, seen)
    view.rename = {**checkpoint.rename, **rename}
    view.unread = checkpoint.unread | (names.keys() - seen.keys())
    return view


def _merged(found: Checkpoint | Adapter, base: Checkpoint) -> MergedAdapter:
    adapter = found if isinstance(found, Adapter) else as_adapter(found, base)
    return MergedAdapter(base, adapter.named_for(base))
