"""Compress a family into a bundle: stream, encode, write; and add tasks to one."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from glob import escape
from pathlib import Path

from fusionkit.bundle import Bundle
from fusionkit.bundle_folder import SHARED, START, WHOLE, disk_errors, new_folder, task_file
from fusionkit.checkpoint import Checkpoint, Source
from fusionkit.codec import DeltaCodec, SharedParts
from fusionkit.errors import BundleError, CodecError
from fusionkit.family import Family
from fusionkit.manifest import BaseRecord, Manifest, TaskRecord
from fusionkit.overlay import WithStart
from fusionkit.partfile import FileRecord, PartWriter
from fusionkit.payload import add_parts, checked
from fusionkit.registry import to_config
from fusionkit.space import Adapters
from fusionkit.task_vectors import TaskVectors

_SHARES = (
    "its tasks share a vector computed from all of them; compress all checkpoints again, or set "
    "keep_shared to encode against the vector as it is"
)

Progress = Callable[[int, int, int], None]
"""Called as tensors are read: pass over the family (from 1), tensors done, tensors in all."""


def compress(
    base: Source | Checkpoint,
    finetuned: Mapping[str, Source | Checkpoint],
    codec: DeltaCodec,
    out: str | Path | None = None,
    *,
    private: Sequence[str] = (),
    frozen: Sequence[str] = (),
    adapters: Adapters = "merged",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Compress fine-tuned models of one base into a bundle.

    Streams tensor by tensor: memory is a few tensors of each model, not the models. Every check
    that needs no values is made before anything is read, and `out` appears whole or not at all.

    Args:
        base: the base model: anything that `Checkpoint` reads.
        finetuned: task name → fine-tuned model: anything that `Checkpoint` reads.
        codec: how to compress.
        out: the folder to write; without one the bundle lives in a temporary folder that goes
            with the object.
        private: patterns of the tensors that are each task's own (heads): stored whole.
        frozen: patterns of the tensors that equal the base's in every task: not stored.
        adapters: of PEFT adapters, compress the weights that they are `merged` into, or the
            adapter `modules` themselves; see `Family`.
        overwrite: replace `out` if it is there.
        progress: called after each tensor of each pass.

    Returns:
        the bundle, opened, with the base at hand.

    Raises:
        CheckpointError: a checkpoint can't be read.
        FamilyError: the checkpoints don't fit together, or hold NaN or infinite values.
        CodecError: the codec can't take these values.
        PluginError: the codec is not registered, so that the bundle could not be opened again.
        BundleError: `out` exists, or can't be written.
    """
    if not isinstance(codec, DeltaCodec):
        raise CodecError(f"expected a DeltaCodec, got {codec!r}")
    config = to_config(codec)
    family = _Tracked(base, finetuned, private, frozen, adapters, progress)
    if out is None:
        folder = Path(tempfile.mkdtemp(prefix="fusionkit-"))
        try:
            with disk_errors(folder):
                _write(folder, family, codec, config)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Bundle.temporary(folder, family.base)
    with new_folder(Path(out), overwrite) as folder:
        _write(folder, family, codec, config)
    return Bundle(out, family.base)


def add_tasks(
    bundle: Bundle,
    finetuned: Mapping[str, Source | Checkpoint],
    *,
    keep_shared: bool = False,
    progress: Progress | None = None,
) -> None:
    """Add tasks to a bundle on disk; the other tasks' files are not touched.

    Args:
        bundle: the bundle; its base must be at hand.
        finetuned: task name → fine-tuned model.
        keep_shared: needed where tasks share a vector (EMR, a merge): the new tasks are then
            encoded against the stored one, which was not computed with them in it.
        progress: called after each tensor of each pass.

    Raises:
        BundleError: a task is there already, or the tasks share a vector and `keep_shared` is
            not set.
        CheckpointError: a checkpoint can't be read.
        FamilyError: a checkpoint does not fit the base.
    """
    present = sorted(set(finetuned) & set(bundle.tasks))
    if present:
        raise BundleError(f"{bundle.path}: has task '{present[0]}' already; remove it first")
    manifest = bundle.manifest
    if bundle.tasks_share and not keep_shared:
        raise BundleError(f"{bundle.path}: {_SHARES}")
    space = manifest.base.space
    base = copy(bundle.base.below if isinstance(bundle.base, WithStart) else bundle.base)
    # Which tensors are buffers is the bundle's to say: a file of the base does not know.
    base.buffers = frozenset(manifest.base.names("exact"))
    frozen = [escape(name) for name in manifest.base.names("frozen")]
    adapters: Adapters = "modules" if space else "merged"
    family = _Tracked(base, finetuned, manifest.private, frozen, adapters, progress)
    if (
        space
        and family.space
        and (space.layout, space.start)
        != (
            family.space.layout,
            family.space.start,
        )
    ):
        raise BundleError(
            f"{bundle.path}: its adapters have other modules, scaling or start than those of "
            f"{', '.join(finetuned)}; compress all of them again with adapters: merged"
        )
    with (
        disk_errors(bundle.path),
        tempfile.TemporaryDirectory(prefix=".add.", dir=bundle.path) as temporary,
    ):
        folder = Path(temporary)
        shared = bundle.shared_parts if keep_shared else None
        new_shared, records = _write_parts(folder, family, bundle.codec, shared, adding=True)
        if new_shared:
            raise BundleError(f"{bundle.path}: {_SHARES}")
        placed = [bundle.path / task_file(task) for task in records]
        try:
            for path in placed:
                (folder / path.name).rename(path)
            bundle.update(replace(manifest, tasks={**manifest.tasks, **records}))
        except OSError:
            for path in placed:
                path.unlink(missing_ok=True)
            raise


class _Tracked(Family):
    """A family that reports how far each pass over it is."""

    def __init__(
        self,
        base: Source | Checkpoint,
        finetuned: Mapping[str, Source | Checkpoint],
        private: Sequence[str],
        frozen: Sequence[str],
        adapters: Adapters,
        progress: Progress | None,
    ) -> None:
        super().__init__(base, finetuned, private, frozen, adapters)
        self._progress = progress
        self._passes = 0

    def __iter__(self) -> Iterator[TaskVectors]:
        self._passes += 1
        this_pass, total = self._passes, len(self)
        for done, vectors in enumerate(super().__iter__(), start=1):
            yield vectors
            if self._progress:
                self._progress(this_pass, done, total)


def _write(folder: Path, family: Family, codec: DeltaCodec, config: dict[str, object]) -> None:
    shared, tasks = _write_parts(folder, family, codec, None)
    Manifest(
        codec=config,
        base=BaseRecord.of(family),
        private=list(family.private_patterns),
        frozen=list(family.frozen_patterns),
        shared=shared,
        tasks=tasks,
    ).write(folder)


def _write_parts(
    folder: Path,
    family: Family,
    codec: DeltaCodec,
    shared: SharedParts | None,
    adding: bool = False,
) -> tuple[FileRecord | None, dict[str, TaskRecord]]:
    """Encode into the folder's files; whole tensors first, as they are the cheapest to check."""
    family.check_frozen()
    own = {task: PartWriter(folder / task_file(task)) for task in family.tasks}
    private_bytes = {task: _write_whole(writer, family, task) for task, writer in own.items()}
    common = PartWriter(folder / SHARED)
    has_shared = family.space is not None and family.space.stored and not adding
    if has_shared and family.space:
        for name in family.space.layout.tensors:
            common.add(f"{START}{name}/{WHOLE}", family.base[name])
    for encoded in checked(codec.encode(family, shared), family, codec):
        if encoded.shared and shared is not None:
            raise CodecError(f"{codec!r} encoded shared parts of '{encoded.name}' anew")
        has_shared |= bool(encoded.shared)
        add_parts(common, encoded.name, encoded.shared)
        for writer, parts in zip(own.values(), encoded.tasks, strict=False):
            add_parts(writer, encoded.name, parts)
    records = {
        task: TaskRecord(
            writer.finish(),
            family.private[task],
            private_bytes[task],
            family.finetuned[task].nbytes,
        )
        for task, writer in own.items()
    }
    return common.finish() if has_shared else None, records


def _write_whole(writer: PartWriter, family: Family, task: str) -> int:
    total = 0
    for tensors in (family.private_tensors(task), family.exact(task)):
        for name, tensor in tensors:
            writer.add(f"{name}/{WHOLE}", tensor)
            total += tensor.nbytes
    return total
