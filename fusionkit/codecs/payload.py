"""What a codec encodes: held to the contract, written, and kept while another builds on it."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fusionkit.bundles.format import SHARED, WHOLE, task_file
from fusionkit.bundles.part_file import Part, PartFile, PartWriter
from fusionkit.codecs.base import WHOLE_MODEL, DeltaCodec, Encoded, Encoder, Parts, SharedParts
from fusionkit.codecs.values import full_precision
from fusionkit.errors import BundleError, CodecError
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.workers import total


class Packed(NamedTuple):
    """One tensor's payload, ready to be written.

    Attributes:
        name: the tensor's name, or `WHOLE_MODEL`.
        files: its parts in the file that tasks share, then in each task's own.
        sums: see `Encoded`.
    """

    name: str
    files: list[list[Part]]
    sums: Tensor | None


Sums = Mapping[str, Tensor | None]
"""A tensor's name → what it adds to the sums over the whole model."""


def encode(
    codec: DeltaCodec,
    family: Family,
    shared: SharedParts | None = None,
    done: Sums | None = None,
) -> Iterator[Packed]:
    """Encode a family: this process's share of the tensors, in threads.

    Args:
        codec: what encodes.
        family: what is encoded.
        shared: the shared parts to encode against, where tasks are added to a bundle.
        done: the tensors that need not be encoded any more.

    Yields:
        each tensor's payload, in the base's order; then the whole model's, if there is one.

    Raises:
        CodecError: the codec breaks its contract.
    """
    encoder = codec.prepare(family, shared)
    try:
        yield from _encode(encoder, codec, family, dict(done or {}))
    finally:
        encoder.close()


def _encode(
    encoder: Encoder, codec: DeltaCodec, family: Family, sums: dict[str, Tensor | None]
) -> Iterator[Packed]:
    left = {name: size for name, size in family.share.items() if name not in sums}
    for name, packed in family.run(lambda n: _one(n, encoder, codec, family), left):
        sums[name] = packed.sums
        yield packed
    gathered = {n: s for each in family.workers.processes.gather(sums) for n, s in each.items()}
    if encoder.finish:
        found = (gathered[name] for name in family.sizes)
        whole = encoder.finish(total(each for each in found if each is not None))
        if whole is not None:
            yield _packed(whole, WHOLE_MODEL, codec, family)


def _one(name: str, encoder: Encoder, codec: DeltaCodec, family: Family) -> Packed:
    return _packed(encoder.encode(family.vectors(name)), name, codec, family)


def _packed(encoded: Encoded, name: str, codec: DeltaCodec, family: Family) -> Packed:
    if encoded.name != name:
        raise CodecError(f"{codec!r} encoded '{encoded.name}' where '{name}' was asked for")
    if len(encoded.tasks) not in (0, len(family.tasks)):
        raise CodecError(
            f"{codec!r} encoded {len(encoded.tasks)} tasks of '{name}', expected "
            f"{len(family.tasks)}"
        )
    own = encoded.tasks or [{}] * len(family.tasks)
    return Packed(name, [_parts(name, parts) for parts in (encoded.shared, *own)], encoded.sums)


def _parts(name: str, parts: Parts) -> list[Part]:
    for part in parts:
        if "/" in part or part == WHOLE:
            raise CodecError(f"a part can't be called '{part}': '/' and '{WHOLE}' are reserved")
    order = sorted(parts, key=lambda part: (-parts[part].dtype.itemsize, part))
    return [Part.of(f"{name}/{part}", parts[part]) for part in order]


@contextmanager
def decoding(path: Path, task: str, name: str, codec: DeltaCodec) -> Iterator[None]:
    """A context that says of which task and tensor a payload can't be made sense of.

    Raises:
        BundleError: it can't.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise BundleError(
            f"{path}: '{name}' of task '{task}' can't be decoded by {codec!r} "
            f"({type(error).__name__}: {error}); copy or compress it again"
        ) from error


class Payload:
    """A family's payload by one codec, in temporary files, to be decoded as another encodes.

    In a distributed run it holds this process's share of the tensors. A context manager: the
    files go when it ends. Memory is a tensor's parts.

    Args:
        codec: what encodes.
        family: what is encoded.
        shared: the shared parts to encode against, where tasks are added to a bundle.
    """

    def __init__(self, codec: DeltaCodec, family: Family, shared: SharedParts | None = None):
        self.codec = codec
        self.tasks = family.tasks
        self._names = {*family.share}
        self._given = shared
        self._folder = tempfile.TemporaryDirectory(prefix="fusionkit-")
        folder = Path(self._folder.name)
        paths = [folder / SHARED, *(folder / task_file(task) for task in family.tasks)]
        writers = [PartWriter(path, family.sizes) for path in paths]
        try:
            for packed in encode(codec, family, shared):
                for writer, parts in zip(writers, packed.files, strict=True):
                    for part in parts:
                        writer.add(part)
            self._files = [
                PartFile(path, writer.finish()) for path, writer in zip(paths, writers, strict=True)
            ]
        except BaseException:
            self._folder.cleanup()
            raise
        self._whole = [self._parts(task, WHOLE_MODEL) for task in range(len(self.tasks))]
        own = [set(file.names()) for file in self._files[1:]]
        self._own = set().union(*own)
        self._kept: tuple[tuple[str, torch.device | None], Tensor] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the files."""
        self._folder.cleanup()

    def encoded(self, name: str) -> Encoded:
        """What the codec encoded under a name."""
        shared = self._files[0].parts(name)
        return Encoded(name, shared, [file.parts(name) for file in self._files[1:]])

    def delta(
        self, task: int, name: str, shape: torch.Size, device: torch.device | None = None
    ) -> Tensor | None:
        """One task's decoded delta of one tensor, not to be changed; None where it is zero.

        Args:
            task: its place in the family.
            name: the tensor's name.
            shape: its shape.
            device: where to decode; the CPU by default.

        Raises:
            CodecError: the tensor is of another process's share.
        """
        if name not in self._names:
            raise CodecError(
                f"'{name}' is another process's to encode; a codec's or merge's passes over a "
                "family must be shared out by Family.each or Family.total"
            )
        for_all = name not in self._own and WHOLE_MODEL not in self._own
        kept = self._kept
        if for_all and kept and kept[0] == (name, device):
            return kept[1]
        own = self._parts(task, name)
        if not own:
            return None
        parts = {**self._whole[task], **own}
        if device is not None:
            parts = {part: tensor.to(device) for part, tensor in parts.items()}
        with full_precision():
            delta = self.codec.decode(parts, shape)
        if for_all:  # one vector for every task, decoded once
            self._kept = (name, device), delta
        return delta

    def _parts(self, task: int, name: str) -> Parts:
        given = self._given(name) if self._given else self._files[0].parts(name)
        return {**given, **self._files[1 + task].parts(name)}
