"""Compress a family into a bundle: stream, encode, write."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.format import MANIFEST, refuse_alike
from fusionkit.bundles.journal import claim, identity, is_resumable, tidy
from fusionkit.bundles.manifest import BaseRecord, Manifest
from fusionkit.bundles.space import bundle_needs
from fusionkit.bundles.writer import BundleWriter
from fusionkit.checkpoints.adapters.modules import Adapters
from fusionkit.checkpoints.checkpoint import Checkpoint, Source, find_checkpoints
from fusionkit.checkpoints.disk import check_space, disk_errors
from fusionkit.checkpoints.output_folder import check_replaceable, new_folder
from fusionkit.checkpoints.paths import is_remote, open_path
from fusionkit.checkpoints.stacks import unsplit
from fusionkit.codecs.base import DeltaCodec
from fusionkit.codecs.named import codec_of
from fusionkit.errors import BundleError, CodecError
from fusionkit.registry import to_config
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.processes import ALONE, Processes
from fusionkit.task_vectors.progress import followed
from fusionkit.task_vectors.workers import Progress, Workers


def compress(
    base: Source | Checkpoint,
    finetuned: Mapping[str, Source | Checkpoint] | str,
    codec: DeltaCodec | type[DeltaCodec] | str,
    out: str | Path | None = None,
    *,
    private: Sequence[str] = (),
    frozen: Sequence[str] = (),
    adapters: Adapters = "merged",
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    processes: Processes = ALONE,
    device: torch.device | str = "cpu",
    rename: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    **settings: Any,
) -> Bundle:
    """Compress fine-tuned models of one base into a bundle.

    Streams tensor by tensor: memory is a few tensors of each model, not the models. Every check
    that needs no values is made before anything is read, and `out` appears whole or not at all.
    A run that is interrupted, where all models are files, goes on from the tensors that it wrote
    when it is called again with the same arguments; they are in a hidden folder beside `out`.

    Args:
        base: the base model: anything that `Checkpoint.of` reads.
        finetuned: task name → fine-tuned model: anything that `Checkpoint.of` reads; or one path
            with a `*` that stands for the task's name (`models/*/model.safetensors`).
        codec: how to compress: a codec; or its id or class, with its settings at the end of the
            call (`codec="svd", rank=16`).
        out: the folder to write; without one the bundle lives in a temporary folder that goes
            with the object.
        private: patterns of the tensors that are each task's own (heads): stored whole.
        frozen: patterns of the tensors that equal the base's in every task: not stored.
        adapters: of PEFT adapters, compress the weights that they are `merged` into, or the
            adapter `modules` themselves; see `Family`.
        overwrite: replace `out` if it is there.
        progress: called after each tensor of each pass; True shows a bar.
        processes: among which the tensors are shared out, all calling this with the same
            arguments; the bundle is, to the byte, the one that one process alone writes.
        device: where to compute; what is stored is the same on every device but for the float32
            rounding of sums, products and decompositions, and the choices that hang on it.
        rename: regular expression → replacement, for names of tensors in all models; see `Family`.
        ignore: patterns of tensors that no one needs, in whichever model they are.
        settings: the codec's own, where it is given by name.

    Returns:
        the bundle, opened, with the base at hand.

    Raises:
        CheckpointError, FamilyError: a checkpoint can't be read, the checkpoints don't fit
            together, or hold NaN or infinite values.
        CodecError, PluginError: the codec can't take these values, has no such setting, or is
            not registered.
        BundleError: `out` exists, or can't be written; two tasks' names look the same.
        ProcessError: another of the processes failed, or has ended.
    """
    shown = None if progress is True and processes.rank else progress
    with processes.together(), followed(shown, "compressing") as callback:
        codec = codec_of(codec, **settings)
        check_codec(codec)
        finetuned = find_checkpoints(finetuned) if isinstance(finetuned, str) else finetuned
        refuse_alike(finetuned)
        if out is not None and not processes.rank:
            check_replaceable(out, overwrite, known_by=MANIFEST)
        workers = Workers(processes, callback)
        family = Family(base, finetuned, private, frozen, adapters, workers, device, rename, ignore)
        if out is None:
            return temporary_bundle(family, codec)
        _write_together(family, codec, open_path(out), overwrite)
    processes.gather(None)  # it is there
    return Bundle(out, unsplit(family.base), key="")


def check_codec(codec: DeltaCodec) -> None:
    """Check that it is a codec, and one by which bundles can be opened again.

    Raises:
        CodecError, PluginError: it is not.
    """
    if not isinstance(codec, DeltaCodec):
        raise CodecError(f"expected a DeltaCodec, got {codec!r}")
    to_config(codec)


def temporary_bundle(family: Family, codec: DeltaCodec, base: BaseRecord | None = None) -> Bundle:
    """Compress a family that is open already, into a bundle whose folder goes with the object.

    Args:
        family: what is compressed.
        codec: how.
        base: the base's record, where it is known already.

    Raises:
        BundleError: it can't be written, or there are several processes.
    """
    if family.workers.processes.count > 1:
        raise BundleError("several processes need a folder to write to: give `out`")
    folder = Path(tempfile.mkdtemp(prefix="fusionkit-"))
    needed = bundle_needs(family, codec)
    try:
        check_space(folder, needed)
        with disk_errors(folder, needed=needed):
            _write(folder, family, codec, base=base)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Bundle.temporary(folder, unsplit(family.base))


def _write_together(family: Family, codec: DeltaCodec, out: Path, overwrite: bool) -> None:
    """Write a bundle's folder, in as many processes as there are; the first one makes it."""
    processes = family.workers.processes
    if processes.rank:
        path, resumable = processes.gather(("", False))[0]
        with disk_errors(out, Path(path) if resumable else None):
            _write(Path(path), family, codec, resumable)
        processes.gather(None)
        return
    resumable = is_resumable(family) and not is_remote(out)
    needed = bundle_needs(family, codec)
    with (
        new_folder(out, overwrite, MANIFEST, keep=resumable, needed=needed) as folder,
        processes.together(),  # the others know before the folder is removed
    ):
        if resumable:
            claim(folder, identity(family, codec, processes))
        processes.gather((str(folder), resumable))
        _write(folder, family, codec, resumable)
        processes.gather(None)  # nobody writes any more
        tidy(folder)


def _write(
    folder: Path,
    family: Family,
    codec: DeltaCodec,
    resumable: bool = False,
    base: BaseRecord | None = None,
) -> None:
    """Write a bundle into a folder; the manifest comes last, from the first process."""
    shared, tasks = BundleWriter(folder, family, codec, resumable).write()
    base = base or BaseRecord.of(family)
    if family.workers.processes.rank == 0:
        Manifest(
            codec=to_config(codec),
            base=base,
            private=list(family.private_patterns),
            frozen=list(family.frozen_patterns),
            shared=shared,
            tasks=tasks,
        ).write(folder)
