"""Which tensors are each task's own, and which are the base's in every task, found by looking.

Who declares nothing has it found: a tensor is *private* that the base lacks, or has in another
shape; *frozen* that equals the base's in every task, or that none of them has. Headers say the
first, values the second: what differs is read up to the first piece that does.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape

import torch

from fusionkit.checkpoints.adapters.modules import Adapters
from fusionkit.checkpoints.checkpoint import PIECE, Checkpoint, Source, matches
from fusionkit.checkpoints.vocabulary import resized
from fusionkit.task_vectors.checks import check_patterns
from fusionkit.task_vectors.opened import open_models
from fusionkit.task_vectors.roles import BUFFERS


@dataclass(frozen=True)
class FoundRoles:
    """What was found, as patterns; a whole part of a model is one (`classifier.*`).

    Attributes:
        lacked: tensors that some task has and the base lacks.
        reshaped: tensors that some task has in another shape than the base.
        equal: tensors that equal the base's in every task.
        absent: other tensors that some task lacks, and none has as its own.
    """

    lacked: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    equal: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def private(self) -> list[str]:
        """Patterns of the tensors that are each task's own."""
        return [*self.lacked, *self.reshaped]

    @property
    def frozen(self) -> list[str]:
        """Patterns of the tensors that are the base's in every task."""
        return [*self.equal, *self.absent]


def find_roles(
    base: Source | Checkpoint,
    finetuned: Mapping[str, Source | Checkpoint],
    private: Sequence[str] = (),
    frozen: Sequence[str] = (),
    adapters: Adapters = "merged",
    rename: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    rounded: bool = True,
) -> FoundRoles:
    """Find what `Family` would else have to be told as `private` and `frozen`.

    Of models that are not fine-tuned from this base nothing is found, so that `Family` says what
    is wrong with them; so it is of adapters whose own modules are compressed, which say it all.

    Args:
        base: as for `Family`.
        finetuned: as for `Family`.
        private: what is declared already, and not looked at.
        frozen: likewise.
        adapters: as for `Family`.
        rename: as for `Family`.
        ignore: as for `Family`.
        rounded: a tensor equals the base's that does so once the base's is rounded to its dtype.

    Raises:
        CheckpointError: a checkpoint can't be read.
        FamilyError: an adapter does not fit the base, or a pattern matches nothing.
    """
    if adapters == "modules":
        return FoundRoles()
    opened = open_models(base, finetuned, adapters, rename or {}, ignore)
    check_patterns(opened.base, opened.finetuned, private, frozen)
    start, tuned = opened.base, list(opened.finetuned.values())
    if not all(_alike(start, each) for each in tuned):
        return FoundRoles()
    told = (*private, *frozen)
    names = [name for name in start if not matches(name, told)]
    foreign = {name for each in tuned for name in each if name not in start}
    lacked = {name for name in foreign if not matches(name, told)}
    reshaped = {name for name in names if any(_reshaped(start, each, name) for each in tuned)}
    held = {name: _held(start, tuned, name) for name in names if name not in reshaped}
    absent = {name for name, each in held.items() if not each} - {
        name for name in held if all(_known(start, each, name) for each in tuned)
    }
    equal = {name for name, each in held.items() if each and _is_equal(start, name, each, rounded)}
    known = [*start, *foreign]
    return FoundRoles(
        lacked=_patterns(lacked, known),
        reshaped=_patterns(reshaped, known),
        equal=_patterns(equal, known),
        absent=_patterns(absent, known),
    )


def _alike(base: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether it can be a model fine-tuned from the base: most names and shapes are the same."""
    shared = [name for name in base if name in tuned]
    foreign = sum(name not in base for name in tuned)
    odd = sum(_reshaped(base, tuned, name) for name in shared)
    return (2 * len(shared) >= len(base) or foreign <= len(shared)) and (
        2 * odd <= max(len(shared), 4)
    )


def _known(base: Checkpoint, tuned: Checkpoint, name: str) -> str | None:
    """A tensor's name in a fine-tuned model, which may have it under a tied one alone."""
    if name in tuned:
        return name
    whole = base.aliases.get(name, name)
    tied = (alias for alias, to in base.aliases.items() if to == whole)
    return next((each for each in (whole, *tied) if each in tuned), None)


def _reshaped(base: Checkpoint, tuned: Checkpoint, name: str) -> bool:
    """Whether it has another shape, and is no vocabulary that grew or was cut down."""
    if name not in tuned or tuned.specs[name].shape == base.specs[name].shape:
        return False
    return not resized(base, tuned, {each: each for each in base if each in tuned}).get(name)


def _held(base: Checkpoint, tuned: Sequence[Checkpoint], name: str) -> list[tuple[Checkpoint, str]]:
    """The fine-tuned models that have a tensor of their own, each with its name there."""
    found = ((each, _known(base, each, name)) for each in tuned)
    return [(each, known) for each, known in found if known and each.touches(known)]


def _is_equal(
    base: Checkpoint, name: str, held: Sequence[tuple[Checkpoint, str]], rounded: bool
) -> bool:
    """Whether a weight is the base's wherever there is one."""
    if not base.specs[name].dtype.is_floating_point or matches(name, BUFFERS):
        return False  # comes back exactly, and costs nothing where it is the same
    return all(_same(base, name, *each, rounded) for each in held)


def _same(base: Checkpoint, name: str, tuned: Checkpoint, known: str, rounded: bool) -> bool:
    spec, own = base.specs[name], tuned.specs[known]
    if spec.shape != own.shape or not (rounded or spec.dtype == own.dtype):
        return False
    if tuned.stored is not tuned:
        return False  # an adapter that touches it
    first, second = base.pieces(name), tuned.pieces(known)
    places = (slice(at, min(at + PIECE, own.numel)) for at in range(0, own.numel, PIECE))
    return all(torch.equal(first(place).to(own.dtype), second(place)) for place in places)


def _patterns(found: Collection[str], names: Iterable[str]) -> tuple[str, ...]:
    """The fewest patterns that match these names and none of the others: whole parts as one."""
    others = {prefix for name in names if name not in found for prefix in _prefixes(name)}
    shortest = (
        next((f"{escape(prefix)}.*" for prefix in _prefixes(name) if prefix not in others), None)
        or escape(name)
        for name in found
    )
    return tuple(sorted(set(shortest)))


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
