"""Add tasks to a bundle: the other tasks' files are not touched."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from msgspec.structs import replace

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.changing import changing
from fusionkit.bundles.format import refuse_alike, task_file
from fusionkit.bundles.manifest import TaskRecord
from fusionkit.bundles.space import bundle_needs
from fusionkit.bundles.writer import BundleWriter
from fusionkit.checkpoints.adapters.modules import Adapters
from fusionkit.checkpoints.checkpoint import Checkpoint, Source, find_checkpoints
from fusionkit.checkpoints.disk import check_space
from fusionkit.checkpoints.stacks import rows_of
from fusionkit.checkpoints.view import View
from fusionkit.errors import BundleError, CodecError, FamilyError, listing
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.progress import followed
from fusionkit.task_vectors.workers import Progress, Workers

_SHARES = (
    "its tasks share a vector computed from all of them; compress all checkpoints again, or set "
    "keep_shared to encode against the vector as it is"
)


def add_tasks(
    bundle: Bundle,
    finetuned: Mapping[str, Source | Checkpoint] | str,
    *,
    keep_shared: bool = False,
    progress: Progress | bool | None = None,
) -> None:
    """Add tasks to a bundle on disk; the other tasks' files are not touched.

    Args:
        bundle: the bundle; its base must be at hand.
        finetuned: task name → fine-tuned model; or one path with a `*` that stands for the task's
            name.
        keep_shared: needed where tasks share a vector (EMR, a merge): the new tasks are then
            encoded against the stored one, which was not computed with them in it.
        progress: called after each tensor of each pass; True shows a bar.

    Raises:
        BundleError: a task is there already, or one that looks the same, or the tasks share a
            vector and `keep_shared` is not set; or another run changes the bundle, or has since it
            was opened.
        CheckpointError: a checkpoint can't be read.
        FamilyError: a checkpoint does not fit the base.
    """
    bundle.check_writable()
    finetuned = find_checkpoints(finetuned) if isinstance(finetuned, str) else finetuned
    present = sorted(set(finetuned) & set(bundle.tasks))
    if present:
        raise BundleError(f"{bundle.path}: has task '{present[0]}' already; remove it first")
    refuse_alike([*bundle.tasks, *finetuned])
    if bundle.tasks_share and not keep_shared:
        raise BundleError(f"{bundle.path}: {_SHARES}")
    with (
        followed(progress, "adding") as callback,
        changing(bundle.path, bundle.manifest) as folder,
    ):
        try:
            family = _family(bundle, finetuned, callback)
        except FamilyError as error:
            raise FamilyError(f"{bundle.path}: {error}") from error
        check_space(folder, bundle_needs(family, bundle.codec))
        shared = bundle.shared_parts if keep_shared else None
        names = bundle.manifest.base.tensors
        writer = BundleWriter(folder, family, bundle.codec, resumable=False, names=names)
        with _against_shared(bundle, keep_shared):
            new_shared, records = writer.write(shared, adding=True)
        if new_shared:
            raise BundleError(f"{bundle.path}: {_SHARES}")
        _place(bundle, folder, records)


@contextmanager
def _against_shared(bundle: Bundle, shared: bool) -> Iterator[None]:
    """A context that says, of tasks that are encoded against shared parts, that these don't fit.

    Raises:
        BundleError: they don't.
    """
    try:
        yield
    except CodecError as error:
        raise type(error)(f"{bundle.path}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if not shared:
            raise
        raise BundleError(
            f"{bundle.path}: {bundle.codec!r} can't encode against what its tasks share "
            f"({type(error).__name__}: {error}); compress all of them again"
        ) from error


def _family(
    bundle: Bundle, finetuned: Mapping[str, Source | Checkpoint], progress: Progress | None
) -> Family:
    """The new tasks and the bundle's base, whose tensors have the roles that they have there."""
    record, space = bundle.manifest.base, bundle.manifest.base.space
    # Which tensors are buffers is the bundle's to say: a file of the base does not know.
    base = View(bundle.whole_base, buffers=frozenset(record.names("exact")))
    rows = rows_of(record.stacks)
    frozen = {escape(rows[n][0] if n in rows else n) for n in record.names("frozen")}
    adapters: Adapters = "modules" if space else "merged"
    workers = Workers(progress=progress)
    family = Family(
        base,
        finetuned,
        bundle.manifest.private,
        sorted(frozen),
        adapters,
        workers,
        rename=record.rename,
        ignore=record.ignore,
    )
    _refuse_others(bundle, family)
    own = family.space
    if space and own and (space.layout, space.start) != (own.layout, own.start):
        raise BundleError(
            f"{bundle.path}: its adapters have other modules, scaling or start than those of "
            f"{', '.join(finetuned)}; compress all of them again with adapters: merged"
        )
    return family


def _refuse_others(bundle: Bundle, family: Family) -> None:
    """Refuse tasks that change what the bundle's tasks have as one, or as the base does.

    Raises:
        BundleError: one does.
    """
    apart = [f"'{a}' apart from '{n}'" for a, n in bundle.tied.items() if a not in family.tied]
    if apart:
        raise BundleError(
            f"{bundle.path}: the bundle's tasks share tensors that {', '.join(family.tasks)} "
            f"holds apart:{listing(apart)}\n{_again(bundle)}"
        )
    if changed := family.unfrozen():
        raise BundleError(
            f"{bundle.path}: the bundle's tasks have tensors as the base does, and deltas of them "
            f"have no place in it:{listing(changed)}\n{_again(bundle)}"
        )


def _again(bundle: Bundle) -> str:
    return (
        "compress all of them again, together: fusionkit compress BASE FINETUNED… --out "
        f"{bundle.path} --overwrite"
    )


def _place(bundle: Bundle, folder: Path, records: Mapping[str, TaskRecord]) -> None:
    """Move the new tasks' files to the others, and name them in the manifest; all or none."""
    placed = [bundle.path / task_file(task) for task in records]
    try:
        for path in placed:
            (folder / path.name).rename(path)
        bundle.update(replace(bundle.manifest, tasks={**bundle.manifest.tasks, **records}))
    except OSError:
        for path in placed:
            path.unlink(missing_ok=True)
        raise
