"""What a codec encodes: held to the contract, and kept while another codec builds on it."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import IO, NamedTuple, Self, TypeVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from fusionkit.checkpoints.safetensors_file import tensor_bytes
from fusionkit.codecs.base import (
    WHOLE,
    WHOLE_MODEL,
    DeltaCodec,
    Encoded,
    Encoder,
    Parts,
    SharedParts,
)
from fusionkit.errors import CodecError, RangeError
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import is_finite
from fusionkit.task_vectors.workers import full_precision, total

Form = TypeVar("Form")

Sums = Mapping[str, Tensor | None]
"""A tensor's name → what it adds to the sums over the whole model."""

_ALIGNED = 64
"""Every part starts at a multiple of so many bytes, so that it can be viewed in any dtype."""


def encode(
    codec: DeltaCodec,
    family: Family,
    form: Callable[[Encoded], Form],
    shared: SharedParts | None = None,
    done: Sums | None = None,
) -> Iterator[Form]:
    """Encode a family: this process's share of the tensors, in threads.

    Args:
        codec: what encodes.
        family: what is encoded.
        form: what is made of each tensor's payload, in the thread that encoded it; its `tasks`
            are never empty here.
        shared: the shared parts to encode against, where tasks are added to a bundle.
        done: the tensors that need not be encoded any more.

    Yields:
        what was made of each tensor's payload, in the base's order; then of the whole model's, if
        there is one.

    Raises:
        CodecError: the codec breaks its contract.
    """
    encoder = codec.prepare(family, shared)
    try:
        yield from _encode(encoder, codec, family, form, dict(done or {}))
    finally:
        encoder.close()


def _encode(
    encoder: Encoder,
    codec: DeltaCodec,
    family: Family,
    form: Callable[[Encoded], Form],
    sums: dict[str, Tensor | None],
) -> Iterator[Form]:
    left = {name: size for name, size in family.share.items() if name not in sums}
    for name, (own, formed) in family.run(lambda n: _one(n, encoder, codec, family, form), left):
        sums[name] = own
        yield formed
        del formed  # it is not needed any more
    gathered = {n: s for each in family.workers.processes.gather(sums) for n, s in each.items()}
    if encoder.finish:
        found = (gathered[name] for name in family.sizes)
        whole = encoder.finish(total(each for each in found if each is not None))
        if whole is not None:
            yield form(_whole(whole, codec, family))


def _one(
    name: str, encoder: Encoder, codec: DeltaCodec, family: Family, form: Callable[[Encoded], Form]
) -> tuple[Tensor | None, Form]:
    """What one tensor adds to the sums, and what was made of it."""
    vectors = family.vectors(name)
    try:
        encoded = _checked(encoder.encode(vectors), name, codec, family)
        _check_finite(encoded)
    except RangeError as error:
        largest = [float(vector.abs().max()) for vector in vectors]
        task = vectors.tasks[largest.index(max(largest))]
        where = f"moved most by task '{task}' ({family.finetuned[task].label})"
        raise RangeError(f"tensor '{name}', {where}: {error}") from error
    except (CodecError, LinAlgError) as error:
        raise CodecError(f"tensor '{name}': {error}") from error
    return encoded.sums, form(encoded)


def _whole(encoded: Encoded, codec: DeltaCodec, family: Family) -> Encoded:
    """The whole model's payload, if it is as the contract has it."""
    encoded = _checked(encoded, WHOLE_MODEL, codec, family)
    for task, parts in zip(family.tasks, encoded.tasks, strict=True):
        try:
            _check_finite(Encoded(WHOLE_MODEL, encoded.shared, [parts]))
        except RangeError as error:
            raise RangeError(f"task '{task}' ({family.finetuned[task].label}): {error}") from error
    return encoded


def _check_finite(encoded: Encoded) -> None:
    """Check that no number in a payload is infinite or NaN: no model could come of it."""
    for parts in (encoded.shared, *encoded.tasks):
        for part, tensor in parts.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise RangeError(
                    f"the deltas are so large, or so uneven, that '{part}' of what is stored would "
                    "be infinite or NaN; store the tensor whole (declare it private), or use a "
                    "codec that takes each value by itself (dense)"
                )


def _checked(encoded: Encoded, name: str, codec: DeltaCodec, family: Family) -> Encoded:
    """What was encoded, if it is as the contract has it; a task of which there is none has {}."""
    if encoded.name != name:
        raise CodecError(f"{codec!r} encoded '{encoded.name}' where '{name}' was asked for")
    if len(encoded.tasks) not in (0, len(family.tasks)):
        raise CodecError(
            f"{codec!r} encoded {len(encoded.tasks)} tasks of '{name}', expected "
            f"{len(family.tasks)}"
        )
    own = encoded.tasks or [{}] * len(family.tasks)
    for parts in (encoded.shared, *own):
        for part in parts:
            if "/" in part or part == WHOLE:
                raise CodecError(f"a part can't be called '{part}': '/' and '{WHOLE}' are reserved")
    return Encoded(encoded.name, encoded.shared, own, encoded.sums)


class _Place(NamedTuple):
    """Where in the file a part is, and what it is."""

    start: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size


class Payload:
    """A family's payload by one codec, on disk, to be decoded as another encodes.

    In a distributed run it holds this process's share of the tensors. A context manager: what is
    on disk, in a file without a name, goes when it ends. Memory is a tensor's parts, and where
    each part is.

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
        self._shared: dict[str, dict[str, _Place]] = {}
        self._own: list[dict[str, dict[str, _Place]]] = [{} for _ in family.tasks]
        handle, path = tempfile.mkstemp(prefix="fusionkit-")
        try:
            with os.fdopen(handle, "wb") as file:
                for encoded in encode(codec, family, _on_cpu, shared):
                    self._add(file, encoded)
                file.write(bytes(_ALIGNED))  # never empty: then it could not be mapped
                size = file.tell()
            self._data = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
        finally:  # what is mapped stays for as long as it is, whatever ends this process
            with suppress(PermissionError):  # of a system that keeps what is mapped
                os.unlink(path)
        self._owned = set().union(*self._own)
        self._whole = [self._parts(task, WHOLE_MODEL) for task in range(len(self.tasks))]
        self._kept: tuple[tuple[str, torch.device | None], Tensor] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of what was kept; nothing can be decoded any more."""
        self._data = self._data.new_empty(0)
        self._whole, self._kept = [], None

    def encoded(self, name: str) -> Encoded:
        """What the codec encoded under a name."""
        shared = self._read(self._shared.get(name, {}))
        return Encoded(name, shared, [self._read(own.get(name, {})) for own in self._own])

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
        for_all = self._owned.isdisjoint((name, WHOLE_MODEL))
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

    def _add(self, file: IO[bytes], encoded: Encoded) -> None:
        parts_of: Sequence[Parts] = (encoded.shared, *encoded.tasks)
        for places, parts in zip((self._shared, *self._own), parts_of, strict=True):
            for part, tensor in parts.items():
                place = _Place(file.tell(), tensor.nbytes, tensor.dtype, tensor.shape)
                places.setdefault(encoded.name, {})[part] = place
                file.write(tensor_bytes(tensor))
                file.write(bytes(-tensor.nbytes % _ALIGNED))

    def _parts(self, task: int, name: str) -> Parts:
        given = self._given(name) if self._given else self._read(self._shared.get(name, {}))
        return {**given, **self._read(self._own[task].get(name, {}))}

    def _read(self, places: Mapping[str, _Place]) -> dict[str, Tensor]:
        return {
            part: self._data[at.start : at.start + at.nbytes].view(at.dtype).view(at.shape)
            for part, at in places.items()
        }


def _on_cpu(encoded: Encoded) -> Encoded:
    """The same payload where it can be written from."""
    shared, *own = (
        {part: tensor.detach().cpu() for part, tensor in parts.items()}
        for parts in (encoded.shared, *encoded.tasks)
    )
    return Encoded(encoded.name, shared, own)
