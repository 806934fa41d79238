"""A bundle's base: found again, and seen under the names that the bundle has for its tensors."""

from collections.abc import Collection

from fusionkit.bundles.hub import base_in_cache
from fusionkit.bundles.manifest import BaseRecord
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.conformed import conformed
from fusionkit.checkpoints.from_config import from_record
from fusionkit.checkpoints.stacks import rows_of
from fusionkit.checkpoints.view import renamed as prefixed
from fusionkit.errors import BundleError, CheckpointError
from fusionkit.task_vectors.opened import renamed


def reopen_base(record: BaseRecord, label: str) -> Checkpoint:
    """Open the base from where it was read when the bundle was made.

    Args:
        record: what the bundle knows of its base.
        label: how messages call the bundle.

    Raises:
        BundleError: it was not a path, or is no longer there.
    """
    try:
        return Checkpoint.of(
            base_in_cache(record.source),
            record.strip_prefix,
            record.add_prefix,
            record.variant,
            record.dequantized,
        )
    except Exception as error:
        raise BundleError(
            f"{label}: the bundle's base ({record.source}) can't be opened from here; a bundle "
            "does not hold its base: give it as `base`"
        ) from error


def fitted(base: Checkpoint, record: BaseRecord) -> Checkpoint:
    """See a model under the names that a bundle has for its base's tensors.

    Names may be those of the class, which the model's own configuration or the bundle's record of
    it tells; or those of the file, in bundles that were made before classes were asked.

    Args:
        base: the model, its stacks whole.
        record: what the bundle knows of its base.

    Returns:
        the way to see it that has most of the bundle's tensors; the model as it is, if none has
        more.
    """
    rows = rows_of(record.stacks)
    wanted = {rows[n][0] if n in rows else n for n in record.tensors} | record.tied.keys()
    best = renamed(base, wanted, record.rename, record.ignore)
    lacking = _lacking(best, wanted)
    for way in (_by_class, _as_stored, _by_record, _as_before) if lacking else ():
        try:
            seen = renamed(way(base, record), wanted, record.rename, record.ignore)
        except CheckpointError:  # it can't be of that class
            continue
        if (left := _lacking(seen, wanted)) < lacking:
            best, lacking = seen, left
        if not lacking:
            break
    return best


def _by_class(base: Checkpoint, record: BaseRecord) -> Checkpoint:
    if base.architecture is not None:
        return base  # it says itself what it is
    return conformed(base, from_record(record.architecture, base.label))


def _by_record(base: Checkpoint, record: BaseRecord) -> Checkpoint:
    """Of another class than the bundle's base, as a classifier is over a bare encoder."""
    return conformed(base, from_record(record.architecture, base.label))


def _as_stored(base: Checkpoint, record: BaseRecord) -> Checkpoint:
    return base.as_stored


def _as_before(base: Checkpoint, record: BaseRecord) -> Checkpoint:
    """With the prefixes that it had then, as a bare encoder has its classifiers'."""
    return prefixed(base, record.strip_prefix, record.add_prefix)


def _lacking(base: Checkpoint, wanted: Collection[str]) -> int:
    return sum(name not in base for name in wanted)
