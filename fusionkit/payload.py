"""What a codec yields: held to the contract, written, and kept while another codec builds on it."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fusionkit.bundle_folder import SHARED, WHOLE, task_file
from fusionkit.codec import WHOLE_MODEL, DeltaCodec, Encoded, Parts, SharedParts
from fusionkit.errors import BundleError, CodecError
from fusionkit.family import Family
from fusionkit.partfile import PartFile, PartWriter
from fusionkit.values import full_precision


def checked(stream: Iterable[Encoded], family: Family, codec: DeltaCodec) -> Iterator[Encoded]:
    """Hold a codec to its contract, so that a faulty one fails here and not on decoding.

    Raises:
        CodecError: it encodes what is no tensor to compress, or not for every task.
    """
    known = {*family.names("delta"), WHOLE_MODEL}
    for encoded in stream:
        if encoded.name not in known:
            raise CodecError(f"{codec!r} encoded '{encoded.name}', which is no tensor to compress")
        if len(encoded.tasks) not in (0, len(family.tasks)):
            raise CodecError(
                f"{codec!r} encoded {len(encoded.tasks)} tasks of '{encoded.name}', expected "
                f"{len(family.tasks)}"
            )
        yield encoded


def add_parts(writer: PartWriter, name: str, parts: Parts) -> None:
    """Write one tensor's parts.

    Raises:
        CodecError: a part has a reserved name.
    """
    for part, tensor in parts.items():
        if "/" in part or part == WHOLE:
            raise CodecError(f"a part can't be called '{part}': '/' and '{WHOLE}' are reserved")
        writer.add(f"{name}/{part}", tensor)


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

    A context manager: the files go when it ends. Memory is a tensor's parts.

    Args:
        codec: what encodes.
        family: what is encoded.
        shared: the shared parts to encode against, where tasks are added to a bundle.

    Attributes:
        names: the tensors of which anything was encoded, in the codec's order.
    """

    def __init__(self, codec: DeltaCodec, family: Family, shared: SharedParts | None = None):
        self.codec = codec
        self.tasks = family.tasks
        self.names: list[str] = []
        self._given = shared
        self._folder = tempfile.TemporaryDirectory(prefix="fusionkit-")
        folder = Path(self._folder.name)
        paths = [folder / SHARED, *(folder / task_file(task) for task in family.tasks)]
        writers = [PartWriter(path) for path in paths]
        try:
            for encoded in checked(codec.encode(family, shared), family, codec):
                if encoded.name != WHOLE_MODEL:
                    self.names.append(encoded.name)
                for writer, parts in zip(writers, (encoded.shared, *encoded.tasks), strict=False):
                    add_parts(writer, encoded.name, parts)
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
        """What the codec yielded under a name."""
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
        """
        for_all = name not in self._own and WHOLE_MODEL not in self._own
        if for_all and self._kept and self._kept[0] == (name, device):
            return self._kept[1]
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
