"""Whether base and fine-tuned checkpoints fit together: patterns, names, shapes, dtypes, ties."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from fusionkit.checkpoints.checkpoint import Checkpoint, TensorSpec, matches
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
    for task, tuned in finetuned.items():
        where = f"{tuned.label} (task '{task}')"
        findings += [
            f"{where}: misses the private tensor '{name}'" for name in wanted if name not in tuned
        ]
        cut = _check_vocabulary(where, base, tuned, known_as, added[task])
        findings += cut.values()
        for name, role in roles.items():
            if name not in cut:
                findings += _check_tensor(where, base, tuned, name, role, known_as[name])
        known = {*private[task], *(each for names in known_as.values() for each in names)}
        findings += [
            f"{where}: has tensor '{name}', which the base lacks (declare it private?)"
            for name in tuned
            if name not in known
        ]
    if findings:
        raise FamilyError(
            f"the fine-tuned checkpoints don't fit the base {base.label}:"
            f"{listing(findings)}{_hint(roles, finetuned)}"
        )


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
    where: str, base: Checkpoint, tuned: Checkpoint, name: str, role: str, names: Sequence[str]
) -> Iterator[str]:
    """What is wrong with one tensor of one fine-tuned checkpoint."""
    known = next((each for each in names if each in tuned), None)
    if known is None:
        if role != "frozen":
            yield f"{where}: misses tensor '{name}' (declare it frozen if it is the base's)"
        return
    yield from _check_spec(where, known, base.specs[name], tuned.specs[known])


def _check_spec(where: str, name: str, base: TensorSpec, tuned: TensorSpec) -> Iterator[str]:
    if base.shape != tuned.shape:
        yield (
            f"{where}: tensor '{name}' has shape {list(tuned.shape)}, the base's has "
            f"{list(base.shape)} (declare it private to store it whole)"
        )
    elif base.dtype != tuned.dtype and not (
        base.dtype.is_floating_point and tuned.dtype.is_floating_point
    ):
        yield f"{where}: tensor '{name}' is {tuned.dtype}, the base's is {base.dtype}"


def _hint(roles: Mapping[str, str], finetuned: Mapping[str, Checkpoint]) -> str:
    """Name the prefix that would make the names fit, where there is one."""
    for tuned in finetuned.values():
        for name in roles:
            for other in tuned:
                if other.endswith("." + name):
                    prefix = other.removesuffix(name)
                    if sum(prefix + own in tuned for own in roles) > len(roles) // 2:
                        return (
                            f"\n{tuned.label} names its tensors with the prefix '{prefix}': "
                            f"give the base as Checkpoint.of(…, add_prefix='{prefix}') or the "
                            f"fine-tuned one as Checkpoint.of(…, strip_prefix='{prefix}')"
                        )
            break
    return ""
