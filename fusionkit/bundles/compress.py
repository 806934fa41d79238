"""Compress a family into a bundle: stream, encode, write; and add tasks to one."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path

import torch

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.format import MANIFEST, task_file
from fusionkit.bundles.journal import claim, identity, is_resumable, tidy
from fusionkit.bundles.manifest import BaseRecord, Manifest
from fusionkit.bundles.writer import BundleWriter
from fusionkit.checkpoints.adapters.modules import Adapters
from fusionkit.checkpoints.checkpoint import Checkpoint, Source
from fusionkit.checkpoints.output_folder import disk_errors, new_folder
from fusionkit.checkpoints.overlay import WithStart
from fusionkit.checkpoints.paths import is_remote, open_path
from fusionkit.checkpoints.view import View
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import BundleError, CodecError
from fusionkit.registry import to_config
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.processes import ALONE, Processes
from fusionkit.task_vectors.workers import Progress, Workers

_SHARES = (
    "its tasks share a vector computed from all of them; compress all checkpoints again, or set "
    "keep_shared to encode against the vector as it is"
)


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
    processes: Processes = ALONE,
    device: torch.device | str = "cpu",
) -> Bundle:
    """Compress fine-tuned models of one base into a bundle.

    Streams tensor by tensor: memory is a few tensors of each model, not the models. Every check
    that needs no values is made before anything is read, and `out` appears whole or not at all.
    A run that is interrupted, where all models are files, goes on from the tensors that it wrote
    when it is called again with the same arguments; they are in a hidden folder beside `out`.

    Args:
        base: the base model: anything that `Checkpoint.of` reads.
        finetuned: task name → fine-tuned model: anything that `Checkpoint.of` reads.
        codec: how to compress.
        out: the folder to write; without one the bundle lives in a temporary folder that goes
            with the object.
        private: patterns of the tensors that are each task's own (heads): stored whole.
        frozen: patterns of the tensors that equal the base's in every task: not stored.
        adapters: of PEFT adapters, compress the weights that they are `merged` into, or the
            adapter `modules` themselves; see `Family`.
        overwrite: replace `out` if it is there.
        progress: called after each tensor of each pass.
        processes: among which the tensors are shared out, all calling this with the same
            arguments; the bundle is, to the byte, the one that one process alone writes.
        device: where to compute. Masks, positions and all that is stored is the same on every
            device, but for sums, products and decompositions, whose float32 rounding differs, and
            for what hangs on them: a sign where a sum is 0 but for rounding, a choice among
            merged values that are equal but for rounding.

    Returns:
        the bundle, opened, with the base at hand.

    Raises:
        CheckpointError: a checkpoint can't be read.
        FamilyError: the checkpoints don't fit together, or hold NaN or infinite values.
        CodecError: the codec can't take these values.
        PluginError: the codec is not registered, so that the bundle could not be opened again.
        BundleError: `out` exists, or can't be written.
        ProcessError: another of the processes failed, or has ended.
    """
    with processes.together():
        if not isinstance(codec, DeltaCodec):
            raise CodecError(f"expected a DeltaCodec, got {codec!r}")
        to_config(codec)
        family = Family(base, finetuned, private, frozen, adapters)
        family.workers = Workers(processes, progress, family.workers.threads)
        family.device = torch.device(device)
        if out is None:
            return _temporary(family, codec)
        out = open_path(out)
        if processes.rank == 0:
            resumable = is_resumable(family) and not is_remote(out)
            with (
                new_folder(out, overwrite, known_by=MANIFEST, keep=resumable) as folder,
                processes.together(),  # the others know before the folder is removed
            ):
                if resumable:
                    claim(folder, identity(family, codec, processes))
                processes.gather((str(folder), resumable))
                _write(folder, family, codec, resumable)
                processes.gather(None)  # nobody writes any more
                tidy(folder)
        else:
            path, resumable = processes.gather(("", False))[0]
            with disk_errors(out, resumable):
                _write(Path(path), family, codec, resumable)
            processes.gather(None)
    processes.gather(None)  # it is there
    return Bundle(out, family.base)


def _temporary(family: Family, codec: DeltaCodec) -> Bundle:
    if family.workers.processes.count > 1:
        raise BundleError("several processes need a folder to write to: give `out`")
    folder = Path(tempfile.mkdtemp(prefix="fusionkit-"))
    try:
        with disk_errors(folder):
            _write(folder, family, codec)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Bundle.temporary(folder, family.base)


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
    bundle.check_writable()
    present = sorted(set(finetuned) & set(bundle.tasks))
    if present:
        raise BundleError(f"{bundle.path}: has task '{present[0]}' already; remove it first")
    manifest = bundle.manifest
    if bundle.tasks_share and not keep_shared:
        raise BundleError(f"{bundle.path}: {_SHARES}")
    space = manifest.base.space
    base = bundle.base.below if isinstance(bundle.base, WithStart) else bundle.base
    # Which tensors are buffers is the bundle's to say: a file of the base does not know.
    base = View(base, buffers=frozenset(manifest.base.names("exact")))
    frozen = [escape(name) for name in manifest.base.names("frozen")]
    adapters: Adapters = "modules" if space else "merged"
    family = Family(base, finetuned, manifest.private, frozen, adapters)
    family.workers = Workers(progress=progress)
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
        writing = BundleWriter(folder, family, bundle.codec, resumable=False)
        new_shared, records = writing.write(shared, adding=True)
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


def _write(folder: Path, family: Family, codec: DeltaCodec, resumable: bool = False) -> None:
    """Write a bundle into a folder; the manifest comes last, from the first process."""
    shared, tasks = BundleWriter(folder, family, codec, resumable).write()
    base = BaseRecord.of(family)
    if family.workers.processes.rank == 0:
        Manifest(
            codec=to_config(codec),
            base=base,
            private=list(family.private_patterns),
            frozen=list(family.frozen_patterns),
            shared=shared,
            tasks=tasks,
        ).write(folder)
