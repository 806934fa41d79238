"""Names of tensors: what wrappers put into them, and a user's own renaming."""

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import islice

from fusionkit.checkpoints.patterns import check_pattern
from fusionkit.errors import CheckpointError

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""Put into names by torch.compile, FSDP and activation checkpointing; never anyone's own."""
_PARALLEL = re.compile(r"(?:^|(?<=\.))module\.")
"""Put there by (Distributed)DataParallel, DeepSpeed; may be a model's own as well."""
_LONGEST = 1024
"""Letters of a name that a renaming gives."""
MOST_PATTERNS = 256
"""Of a renaming."""
MOST_REPLACED = 512
"""Letters of what one of them is replaced by."""


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names without what torch.compile, FSDP and checkpointing put into them.

    Args:
        names: as they are.

    Returns:
        name without → name as it is, in the same order; as they are, if two would become one.
    """
    names = list(names)
    found = {_WRAPPERS.sub("", name): name for name in names}
    return found if len(found) == len(names) else {name: name for name in names}


def matched(
    names: Collection[str], wanted: Collection[str], shorter: bool = False
) -> dict[str, str]:
    """Names as another checkpoint has them, if only a wrapper's `module.` tells them apart.

    Args:
        names: as they are.
        wanted: the other's.
        shorter: take `module.` out where the other lacks it, and never put it in.

    Returns:
        name as wanted → name as it is, in the same order; what is not wanted keeps its own.
    """
    known, found = set(wanted), {}
    others = {_PARALLEL.sub("", name): name for name in known - set(names)}
    for name in names:
        bare = _PARALLEL.sub("", name)
        other = others.get(bare, name)
        found[name if name in known or (shorter and other != bare) else other] = name
    return found if len(found) == len(names) else {name: name for name in names}


def prefix_over(names: Collection[str], longer: Collection[str]) -> str:
    """What others have in front of most of these names; empty, if there is no such prefix."""
    known = set(longer)
    for name in islice(names, 50):
        for other in longer:
            if other.endswith("." + name):
                prefix = other.removesuffix(name)
                if sum(prefix + each in known for each in names) > len(names) / 2:
                    return prefix
    return ""


def replaced(names: Iterable[str], rename: Mapping[str, str], label: str) -> dict[str, str]:
    """Names after a user's own renaming.

    Args:
        names: as they are.
        rename: regular expression → replacement, in turn, as `re.sub` takes them.
        label: how messages call the checkpoint.

    Returns:
        new name → name as it is, in the same order.

    Raises:
        CheckpointError: a pattern is no regular expression, or could take long, or two names
            become one.
    """
    if len(rename) > MOST_PATTERNS:
        raise CheckpointError(
            f"{label}: `rename` has {len(rename)} patterns, and may have {MOST_PATTERNS}; join some"
        )
    names = list(names)
    changed = names
    for pattern, replacement in rename.items():
        try:
            _check_letters("what replaces it", replacement, MOST_REPLACED)
            check_pattern(pattern, max(map(len, changed), default=0))
            changed = [re.sub(pattern, replacement, name) for name in changed]
            _check_letters("a name", max(changed, key=len, default=""), _LONGEST)
        except (re.error, ValueError) as error:
            raise CheckpointError(
                f"{label}: `rename`: '{pattern[:99]}' → '{replacement[:99]}': {error}; write "
                "`\\.` for a dot and `\\1` for a group"
            ) from error
    found: dict[str, str] = {}
    for name, new in zip(names, changed, strict=True):
        if new in found:
            raise CheckpointError(
                f"{label}: `rename` gives '{found[new]}' and '{name}' one name, '{new}'; make its "
                "patterns narrower"
            )
        found[new] = name
    return found


def _check_letters(what: str, text: str, most: int) -> None:
    if len(text) > most:
        raise ValueError(f"{what} has more than {most} letters")
