"""Weights by name, read one tensor at a time: what every kind of checkpoint is."""

from abc import ABCMeta
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape as glob_escape
from glob import glob
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.checkpoints.architecture import Architecture
from fusionkit.checkpoints.headed import Headed
from fusionkit.checkpoints.path_text import forms, one_form
from fusionkit.checkpoints.paths import glob_remote, is_remote, written_out
from fusionkit.errors import CheckpointError, size

Source = str | Path | nn.Module | Mapping[str, Tensor] | Headed
"""What a checkpoint can be read from; a `Checkpoint` is such a mapping itself."""

Pieces = Callable[[slice], Tensor]
"""Reads some neighbouring entries of one tensor, flattened, in its own dtype; not to be changed,
and valid until the next call."""

PIECE = 1 << 20
"""Entries that are compared at once."""

MOST_TENSORS = 1 << 20
"""Of a model; those that are in use have fewer by far."""


Made = TypeVar("Made")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of entries."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


class _Opening(ABCMeta):
    """Has `Checkpoint(…)` open a source by the class of its kind, as `pathlib.Path(…)` does."""

    def __call__(cls: type[Made], *args: Any, **kwargs: Any) -> Made:
        """Open a source, where it is `Checkpoint` itself that is called."""
        if cls is Checkpoint:
            return cast(Made, Checkpoint.of(*args, **kwargs))
        return cast(Made, type.__call__(cls, *args, **kwargs))


class Checkpoint(Mapping[str, Tensor], metaclass=_Opening):
    """A model's tensors by name, read one at a time; `Checkpoint.of`, or a call, opens one.

    Every kind of source has a class of its own, which says what is known of it and how a tensor
    is read. Names that share one tensor (tied weights) are listed in `aliases`; they are entries
    of the mapping like any other.

    Attributes:
        label: how messages and manifests call the source.
        specs: shape and dtype by name.
        aliases: tied name → name of the tensor that it shares.
        buffers: names known to be buffers (a live module's; empty for files).
        nbytes: bytes on disk of the source's files; of its tensors where it is not a file.
        files: the files that it is read from; none of a live source.
        serial: reading involves other processes, so that all read the same tensors in one order.
        live: others can change the tensors while they are read from here: a module or mapping.
        strip_prefix: what was taken off the source's names.
        add_prefix: what was put in front of them.
        architecture: what is known of the model's class; None: nothing but what is stored.
        rename: what a user's own renaming was; see `Family`.
        unread: names that are stored, and left out here since no one reads such tensors.
        variant: which of a folder's weights they are; None for those without one.
        dequantized: it was quantised, and is read as the unquantised model.
    """

    label: str
    specs: Mapping[str, TensorSpec]
    nbytes: int
    aliases: Mapping[str, str] = MappingProxyType({})
    buffers: frozenset[str] = frozenset()
    files: tuple[Path, ...] = ()
    serial: bool = False
    live: bool = False
    strip_prefix: str = ""
    add_prefix: str = ""
    architecture: Architecture | None = None
    rename: Mapping[str, str] = MappingProxyType({})
    unread: frozenset[str] = frozenset()
    variant: str | None = None
    dequantized: bool = False
    opener: ClassVar[Callable[["Source", str, str, str | None, bool], "Checkpoint"]]
    """What `of` calls; `opening`, which knows every kind of checkpoint, puts it here."""

    def __init__(
        self,
        source: Source,
        strip_prefix: str = "",
        add_prefix: str = "",
        variant: str | None = None,
        dequantize: bool = False,
    ) -> None:
        """`Checkpoint(…)` is `Checkpoint.of(…)`; a class derived from it has its own.

        Args:
            source: see `of`.
            strip_prefix: see `of`.
            add_prefix: see `of`.
            variant: see `of`.
            dequantize: see `of`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no __init__ of its own")

    @classmethod
    def of(
        cls,
        source: Source,
        strip_prefix: str = "",
        add_prefix: str = "",
        variant: str | None = None,
        dequantize: bool = False,
    ) -> "Checkpoint":
        """Open a source, whatever it is.

        Reads a safetensors file, a (sharded) Hugging Face folder or its index, a PyTorch
        `.pt`/`.pth`/`.bin` file, a Lightning `.ckpt`, a live module or a mapping of tensors.
        Pickles are only opened with `weights_only=True`. No file is memory-mapped: one that others
        cut short or write over while it is read is an error. Files may be anywhere
        that fsspec reaches (`s3://…`, `hf://…`): of safetensors, what is asked for is fetched as
        it is needed.

        Args:
            source: a path, module or mapping. `package:NAME/FOLDER` is a folder of an installed
                Python package. A checkpoint comes back as it is, unless a prefix is given.
            strip_prefix: keep only tensors whose name starts with it, and take it off
                (`model.` for many Lightning checkpoints).
            add_prefix: put in front of every name (`bert.` to give a bare encoder the names that
                it has inside a classifier).
            variant: of a folder's weights, as in `from_pretrained`: `fp16` for
                `model.fp16.safetensors`.
            dequantize: read a quantised model (bitsandbytes, GPTQ, AWQ, FP8, MXFP4,
                compressed-tensors, GGUF) as the unquantised one, tensor by tensor; another comes
                back as it is.

        Raises:
            CheckpointError: the source can't be read, or the folder holds two models; the message
                names the file and the mend.
        """
        return cls.opener(source, strip_prefix, add_prefix, variant, dequantize)

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor in its own dtype; it may share memory with a live source.

        Every kind has its own. (It is not marked abstract, so that type checkers and recipes let
        `Checkpoint(…)` be called.)
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how a tensor is read")

    def pieces(self, name: str) -> Pieces:
        """Read a tensor piece by piece; from a safetensors file, no more of it is in memory."""
        return self[name].reshape(-1).__getitem__

    def prefetch(self, name: str) -> None:
        """Have a tensor's bytes read ahead, where that can be."""

    def row(self, name: str, index: int) -> Tensor:
        """Read one entry along a tensor's first axis: `(*shape[1:])`, in its own dtype."""
        spec = self.specs[name]
        return self.row_pieces(name, index)(slice(0, spec.numel // spec.shape[0])).view(
            spec.shape[1:]
        )

    def row_pieces(self, name: str, index: int) -> Pieces:
        """Read the same piece by piece."""
        spec, pieces = self.specs[name], self.pieces(name)
        start = index * (spec.numel // spec.shape[0])
        return lambda place: pieces(slice(start + place.start, start + place.stop))

    def prefetch_row(self, name: str, index: int) -> None:
        """Have it read ahead, where that can be."""
        if index == 0:  # all of it at once
            self.prefetch(name)

    @property
    def as_stored(self) -> "Checkpoint":
        """The same under the names that are stored; itself, where these are its own."""
        return self

    @property
    def plain(self) -> "Checkpoint":
        """The model alone, where an adapter's initial tensors are laid over it; else itself."""
        return self

    @property
    def stored(self) -> "Checkpoint":
        """What is stored of it: an adapter's own tensors, where one is merged in; else itself."""
        return self

    def touches(self, name: str) -> bool:
        """Whether a tensor may be another than the base's, rather than that, seen through this."""
        return True

    def delta(self, name: str) -> Tensor | None:
        """A tensor's change from the base, where an adapter says it: float32 `(*shape)`."""
        return None

    def low_rank(self, name: str) -> LowRank | None:
        """The same as a product, where an adapter has it as one."""
        return None

    def row_delta(self, name: str, index: int) -> Tensor | None:
        """Of one entry along the first axis, its change: float32 `(*shape[1:])`."""
        delta = self.delta(name)
        return None if delta is None else delta[index]

    def row_low_rank(self, name: str, index: int) -> LowRank | None:
        """The same as a product, where an adapter has it as one."""
        return None

    def in_memory(self, device: torch.device | None = None) -> "Checkpoint":
        """A copy of every tensor, in memory; tied tensors stay tied.

        Args:
            device: where to; by default each tensor stays where it is.
        """
        return Copied(self, device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __repr__(self) -> str:
        dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in self.specs.values()})
        count = sum(spec.numel for name, spec in self.specs.items() if name not in self.aliases)
        values = f"{count:,} values in {' and '.join(dtypes)}, {size(self.nbytes)}"
        return f"{type(self).__name__}({self.label!r}, {len(self)} tensors, {values})"


class Copied(Checkpoint):
    """A copy of another checkpoint, which stays as it is; tied tensors stay tied.

    Args:
        source: what is copied.
        device: where to; by default each tensor stays where it is.
    """

    def __init__(self, source: Checkpoint, device: torch.device | None = None) -> None:
        self.label, self.buffers = source.label, source.buffers
        self.specs = source.specs
        self.aliases = dict(source.aliases)  # the class's own can't be pickled
        self.strip_prefix, self.add_prefix = source.strip_prefix, source.add_prefix
        self.architecture, self.unread = source.architecture, source.unread
        self.rename = dict(source.rename)
        self.variant = source.variant
        self.dequantized = source.dequantized
        own: dict[str, Tensor] = {}
        for name in source:
            if name not in source.aliases:
                tensor = source[name]
                own[name] = tensor.to(device or tensor.device, copy=True)
        self._tensors = {name: own[source.aliases.get(name, name)] for name in source}
        self.nbytes = bytes_of(self._tensors, self.aliases)

    def __getitem__(self, name: str) -> Tensor:
        """The copy itself."""
        with reading(self.label, name):
            return self._tensors[name].detach()


@contextmanager
def reading(label: str, name: str) -> Iterator[None]:
    """A context that tells which tensor of which checkpoint is missing, or can't be read.

    Args:
        label: the checkpoint's.
        name: the tensor's.

    Raises:
        KeyError: there is no such tensor.
        CheckpointError: it can't be read.
    """
    try:
        yield
    except KeyError:
        raise KeyError(f"{label}: no tensor '{name}'") from None
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{label}: tensor '{name}' can't be read: {error}") from error


def bytes_of(tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> int:
    """Their bytes, tied ones once."""
    return sum(tensor.nbytes for name, tensor in tensors.items() if name not in aliases)


def find_checkpoints(pattern: str) -> dict[str, str]:
    """Find tasks by a path with one `*`: what it stands for names the task.

    Args:
        pattern: a path such as `models/*/model.safetensors`.

    Returns:
        task name (in Unicode's composed form, as keyboards write it) → path, sorted by name.

    Raises:
        CheckpointError: there is not exactly one `*`, nothing matches, or two names differ in
            their Unicode form alone.
    """
    path = written_out(pattern)
    if path.count("*") != 1 or "**" in path:
        raise CheckpointError(f"{pattern}: expected exactly one '*', for the task's name")
    if is_remote(path):
        before, after = path.split("*")
        return _by_task(pattern, {name: before + name + after for name in glob_remote(path)})
    for form in forms(path):
        before, after = form.split("*")
        found = sorted(glob(glob_escape(before) + "*" + glob_escape(after)))
        if found:
            end = -len(after) or None
            return _by_task(pattern, {path[len(before) : end]: path for path in found})
    raise CheckpointError(f"{pattern}: nothing matches (relative to {Path.cwd()})")


def _by_task(pattern: str, found: Mapping[str, str]) -> dict[str, str]:
    if not found:
        raise CheckpointError(f"{pattern}: nothing matches")
    named: dict[str, str] = {}
    for name, path in found.items():
        if (other := named.setdefault(one_form(name), path)) is not path:
            raise CheckpointError(
                f"{pattern}: {other!a} and {path!a} name one task in two Unicode forms; "
                "rename one of them"
            )
    return named


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a tensor's name matches one of the shell-style patterns (case matters)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def same_values(one: Checkpoint, name: str, two: Checkpoint, other: str) -> bool:
    """Whether two tensors are equal to the bit, shape and dtype too; read piece by piece.

    Args:
        one: the checkpoint that has the first one.
        name: its name there.
        two: the checkpoint that has the second one; may be the same.
        other: its name there.
    """
    spec = one.specs.get(name)
    if spec is None or spec != two.specs.get(other):
        return False
    if one is two and one.aliases.get(name, name) == one.aliases.get(other, other):
        return True
    first, second = one.pieces(name), two.pieces(other)
    places = (slice(at, min(at + PIECE, spec.numel)) for at in range(0, spec.numel, PIECE))
    return all(torch.equal(_bytes(first(place)), _bytes(second(place))) for place in places)


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
