"""Whether base and fine-tuned checkpoints fit together: patterns, names, shapes, dtypes, ties."""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from fusionkit.checkpoints.architecture import is_stack
from fusionkit.checkpoints.checkpoint import Checkpoint, TensorSpec, matches
from fusionkit.checkpoints.names import prefix_over
from fusionkit.checkpoints.settings import differing
from fusionkit.checkpoints.stacks import unsplit, whole_name
from fusionkit.checkpoints.vocabulary import left_behind, resized, rows_in
from fusionkit.errors import FamilyError, listing


def check_patterns(
    base: Checkpoint,
    finetuned: Mapping[str, Checkpoint],
    private: Sequence[str],
    frozen: Sequence[str],
) -> None:
    """Check that every pattern means something, and no tensor is under patterns of both kinds.

    Args:
        base: the base.
        finetuned: task name → its checkpoint.
        private: patterns of the tasks' own tensors.
        frozen: patterns of the tensors that equal the base's.

    Raises:
        FamilyError: a pattern matches no tensor, or a tensor is declared private and frozen.
    """
    checkpoints = (base, *finetuned.values())
    names = set(base).union(*checkpoints, *(each.unread for each in checkpoints))
    idle = [
        f"{kind} pattern '{pattern}'"
        for kind, patterns in (("private", private), ("frozen", frozen))
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if idle:
        raise FamilyError(
            f"these match no tensor of {base.label} or of a fine-tuned checkpoint:"
            f"{listing(idle)}\nthe names begin like '{min(names)}'; mend or drop the pattern"
        )
    both = [name for name in base if matches(name, private) and matches(name, frozen)]
    if both:
        raise FamilyError(f"declared both private and frozen:{listing(both)}")


def check_fit(
    base: Checkpoint,
    finetuned: Mapping[str, Checkpoint],
    roles: Mapping[str, str],
    known_as: Mapping[str, Sequence[str]],
    private: Mapping[str, Sequence[str]],
    wanted: Sequence[str],
    added: Mapping[str, Mapping[str, int]],
) -> None:
    """Check that every fine-tuned checkpoint has what the base has, as the base has it.

    Args:
        base: the base.
        finetuned: task name → its checkpoint.
        roles: base tensor's name → role, private tensors and tied names left out.
        known_as: base tensor's name → all its names, tied ones after it.
        private: task name → names of its private tensors.
        wanted: names of the private tensors that every task must have.
        added: task name → base tensor's name → rows that it added, which are not looked at.

    Raises:
        FamilyError: one does not fit; the message lists every finding, with the prefix that would
            make the names fit, where there is one.
    """
    findings = []
    lacking = _lacking(finetuned, roles, known_as)
    for task, tuned in finetuned.items():
        where = f"{tuned.label} (task '{task}')"
        known = {*private[task], *(each for names in known_as.values() for each in names)}
        foreign = [name for name in tuned if name not in known]
        if unlike := _unlike(base, tuned, roles, known_as, foreign):
            findings.append(f"{where}: {unlike}")
            continue
        findings += [
            f"{where}: misses the private tensor '{name}'" for name in wanted if name not in tuned
        ]
        cut = _check_vocabulary(where, base, tuned, known_as, added[task])
        findings += cut.values()
        for name, role in roles.items():
            if name not in cut:
                findings += _check_tensor(where, base, tuned, name, role, known_as[name], lacking)
        findings += [
            f"{where}: has tensor '{whole_name(tuned, name)}', which the base lacks (declare it "
            "private if the task's model has it, ignore it if no one needs it)"
            for name in foreign
        ]
    if findings:
        raise FamilyError(
            f"the fine-tuned checkpoints don't fit the base {base.label}:"
            f"{listing([*dict.fromkeys(findings)])}{_prefix_hint(base, finetuned)}"
        )


class SettingsWarning(UserWarning):
    """A fine-tune's configuration makes another function of the same weights."""


def warn_of_settings(base: Checkpoint, finetuned: Mapping[str, Checkpoint]) -> None:
    """Warn where a fine-tune is configured otherwise than its base, in what changes its outputs.

    A bundle keeps weights: a model of the base's configuration that is switched to the task would
    compute something else of them. An exported folder has the task's own.
    """
    for task, tuned in finetuned.items():
        if found := differing(base.architecture, tuned.architecture):
            warnings.warn(
                f"{tuned.label} (task '{task}') is configured otherwise than the base "
                f"{base.label}:{listing(found)}\nweights alone are kept for it: what it computes "
                "of them, a model of the base's configuration does not; export its folder "
                "(--format model), or build the model by the task's own config.json",
                SettingsWarning,
                stacklevel=4,
            )


def _lacking(
    finetuned: Mapping[str, Checkpoint],
    roles: Mapping[str, str],
    known_as: Mapping[str, Sequence[str]],
) -> set[str]:
    """The tensors that no fine-tuned checkpoint has."""
    return {
        name
        for name in roles
        if not any(known in tuned for tuned in finetuned.values() for known in known_as[name])
    }


def _unlike(
    base: Checkpoint,
    tuned: Checkpoint,
    roles: Mapping[str, str],
    known_as: Mapping[str, Sequence[str]],
    foreign: Sequence[str],
) -> str:
    """What is wrong with a checkpoint as a whole: it is another model; empty if it is none."""
    wanted = [name for name, role in roles.items() if role != "frozen"]
    found = {
        name: next(known for known in known_as[name] if known in tuned)
        for name in wanted
        if any(known in tuned for known in known_as[name])
    }
    if len(found) < len(wanted) / 2 and len(foreign) > len(found):
        return (
            f"has {len(found)} of the base's {len(wanted)} tensors, and {len(foreign)} others, as "
            f"'{foreign[0]}', where the base has names as '{wanted[0]}': if it is the same model "
            "under other names, `rename` them; else it is not fine-tuned from this base"
        )
    odd = [n for n, known in found.items() if tuned.specs[known].shape != base.specs[n].shape]
    if len(odd) > max(len(found) / 2, 2):
        return (
            f"has {len(odd)} of {len(found)} tensors in other shapes than the base, '{odd[0]}' in "
            f"{list(tuned.specs[found[odd[0]]].shape)} for {list(base.specs[odd[0]].shape)}: a "
            "model of another size or family; give the base that it was fine-tuned from"
        )
    return ""


def _check_vocabulary(
    where: str,
    base: Checkpoint,
    tuned: Checkpoint,
    known_as: Mapping[str, Sequence[str]],
    added: Mapping[str, int],
) -> dict[str, str]:
    """What is wrong with a vocabulary of another size, by tensor."""
    names = {
        name: known
        for name, names in known_as.items()
        if (known := next((each for each in names if each in tuned), None))
    }
    findings = {}
    for name, rows in resized(base, tuned, names).items():
        known, before = names[name], rows_in(base.specs[name].shape)
        findings[name] = (
            f"{where}: tensor '{known}' has {before + rows} rows where the base has "
            f"{before} (a vocabulary cut down): which of them were dropped is not known; "
            f"declare it private to store it whole: {', '.join(known_as[name])}"
        )
    for name, other in left_behind(base, tuned, names, added).items():
        findings[name] = (
            f"{where}: adds {added[other]} rows to '{other}', and has none of them for "
            f"'{name}', which the model that it was trained with had; save the adapter again with "
            "save_embedding_layers=True"
        )
    return findings


def _check_tensor(
    where: str,
    base: Checkpoint,
    tuned: Checkpoint,
    name: str,
    role: str,
    names: Sequence[str],
    lacking: Collection[str],
) -> Iterator[str]:
    """What is wrong with one tensor of one fine-tuned checkpoint."""
    known = next((each for each in names if each in tuned), None)
    if known is None:
        if role != "frozen":
            mend = (
                "declare it frozen if the tasks have the base's, ignore it if no one needs it"
                if name in lacking
                else "other tasks have it: save it into this one, too"
            )
            yield f"{where}: misses tensor '{whole_name(base, name)}' ({mend})"
        return
    yield from _check_spec(where, known, base.specs[name], tuned.specs[known])


def _check_spec(where: str, name: str, base: TensorSpec, tuned: TensorSpec) -> Iterator[str]:
    if base.shape != tuned.shape:
        mend = "declare it private to store it whole"
        if is_stack(name, base.shape):  # as many as the router chooses among
            mend = "other experts: give the base that it was fine-tuned from"
        yield (
            f"{where}: tensor '{name}' has shape {list(tuned.shape)}, the base's has "
            f"{list(base.shape)} ({mend})"
        )
    elif base.dtype != tuned.dtype and not (
        base.dtype.is_floating_point and tuned.dtype.is_floating_point
    ):
        yield f"{where}: tensor '{name}' is {tuned.dtype}, the base's is {base.dtype}"


def _prefix_hint(base: Checkpoint, finetuned: Mapping[str, Checkpoint]) -> str:
    """Name the prefix that would make the names fit, where there is one."""
    own = list(unsplit(base))
    for task, tuned in finetuned.items():
        theirs, names = f"{tuned.label} (task '{task}')", list(unsplit(tuned))
        if prefix := prefix_over(own, names):
            longer, shorter, prefixed, bare = theirs, "the base", names, own
        elif prefix := prefix_over(names, own):
            longer, shorter, prefixed, bare = f"the base {base.label}", theirs, own, names
        else:
            continue
        mends = [f"give {shorter} as Checkpoint.of(…, add_prefix='{prefix}')"]
        stripped = {name.removeprefix(prefix) for name in prefixed}
        if len(stripped) == len(prefixed) and not any(name.startswith(prefix) for name in bare):
            mends.insert(0, f"set rename={ {'^' + re.escape(prefix): ''} }")
        return f"\n{longer} names its tensors with the prefix '{prefix}': {', or '.join(mends)}"
    return ""
