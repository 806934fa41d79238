"""One lazy reader for every kind of checkpoint: tensors by name, nothing loaded until asked for."""

import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from glob import escape as glob_escape
from glob import glob
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fusionkit.checkpoints.paths import glob_remote, is_remote, open_path, resolve_package_path
from fusionkit.checkpoints.safetensors_file import Pieces, TensorFile, TensorSpec
from fusionkit.errors import CheckpointError, listing

Source = str | Path | nn.Module | Mapping[str, Tensor]
"""What a checkpoint can be read from; a `Checkpoint` is such a mapping itself."""

_PICKLES = {".pt", ".pth", ".bin", ".ckpt"}
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class _Opened:
    """What every kind of source comes down to."""

    specs: dict[str, TensorSpec]
    read: Callable[[str], Tensor]
    nbytes: int
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    pieces: Callable[[str], Pieces] | None = None
    """How to read a tensor in pieces, where it need not be read whole for that."""
    files: tuple[Path, ...] = ()
    prefetch: Callable[[str], None] = lambda name: None


class Checkpoint(Mapping[str, Tensor]):
    """A model's tensors by name, read one at a time.

    Reads a safetensors file, a (sharded) Hugging Face folder or its index, a PyTorch
    `.pt`/`.pth`/`.bin` file, a Lightning `.ckpt`, a live module or a mapping of tensors. Pickles
    are only opened with `weights_only=True` and memory-mapped. Files may be anywhere that fsspec
    reaches (`s3://…`, `hf://…`): of safetensors, what is asked for is fetched as it is needed.
    Names that share one tensor (tied weights) are listed in `aliases`; they are entries of the
    mapping like any other.

    Args:
        source: a path, module or mapping. `package:NAME/FOLDER` is a folder of an installed
            Python package.
        strip_prefix: keep only tensors whose name starts with it, and take it off
            (`model.` for many Lightning checkpoints).
        add_prefix: put in front of every name (`bert.` to give a bare encoder the names that it
            has inside a classifier).

    Attributes:
        label: how messages and manifests call the source.
        specs: shape and dtype by name.
        aliases: tied name → name of the tensor that it shares.
        buffers: names known to be buffers (a live module's; empty for files).
        nbytes: bytes on disk of the source's files; of its tensors where it is not a file.
        files: the files that it is read from; none of a live source.
        serial: reading involves other processes, so that all read the same tensors in one order.
        live: others can change the tensors while they are read from here: a module or mapping.

    Raises:
        CheckpointError: the source can't be read; the message names the file and the mend.
    """

    serial = False

    def __init__(
        self,
        source: str | Path | nn.Module | Mapping[str, Any],
        strip_prefix: str = "",
        add_prefix: str = "",
    ) -> None:
        self.strip_prefix = strip_prefix
        self.add_prefix = add_prefix
        self.label = _label(source)
        self.live = not isinstance(source, str | Path)
        opened = _open(source, self.label)
        renamed = {
            add_prefix + name.removeprefix(strip_prefix): name
            for name in opened.specs
            if name.startswith(strip_prefix)
        }
        if not renamed:
            raise CheckpointError(
                f"{self.label}: holds no tensor"
                + (f" whose name starts with '{strip_prefix}'" if strip_prefix else "")
            )
        new = {old: name for name, old in renamed.items()}
        self._names = renamed
        self._read, self._pieces, self._prefetch = opened.read, opened.pieces, opened.prefetch
        self.specs = {name: opened.specs[old] for name, old in renamed.items()}
        self.aliases = {
            new[alias]: new[target]
            for alias, target in opened.aliases.items()
            if alias in new and target in new
        }
        self.buffers = frozenset(new[name] for name in opened.buffers if name in new)
        self.nbytes = opened.nbytes
        self.files = opened.files

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor in its own dtype; it may share memory with a live source."""
        try:
            return self._read(self._names[name])
        except KeyError:
            raise KeyError(f"{self.label}: no tensor '{name}'") from None
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.label}: tensor '{name}' can't be read: {error}"
            ) from error

    def pieces(self, name: str) -> Pieces:
        """Read a tensor piece by piece; from a safetensors file, no more of it is in memory."""
        if self._pieces is None:
            return self[name].reshape(-1).__getitem__
        try:
            return self._pieces(self._names[name])
        except OSError as error:
            raise CheckpointError(
                f"{self.label}: tensor '{name}' can't be read: {error}"
            ) from error

    def prefetch(self, name: str) -> None:
        """Have a tensor's bytes read ahead, where that can be."""
        with suppress(OSError):  # it will be met again, and reported, when the tensor is read
            self._prefetch(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __repr__(self) -> str:
        return f"Checkpoint({self.label!r}, {len(self)} tensors)"

    def in_memory(self, device: torch.device | None = None) -> "Checkpoint":
        """A copy of every tensor, in memory; tied tensors stay tied.

        Args:
            device: where to; by default each tensor stays where it is.
        """
        copies: dict[str, Tensor] = {}
        for name in self:
            if name not in self.aliases:
                tensor = self[name]
                copies[name] = tensor.to(device or tensor.device, copy=True)
        copied = Checkpoint({name: copies[self.aliases.get(name, name)] for name in self})
        copied.label, copied.buffers, copied.live = self.label, self.buffers, False
        copied.strip_prefix, copied.add_prefix = self.strip_prefix, self.add_prefix
        return copied

    @classmethod
    def of(cls, source: "Source | Checkpoint") -> "Checkpoint":
        """The source as a checkpoint; one that is a checkpoint already comes back as it is."""
        return source if isinstance(source, cls) else cls(source)


def find_checkpoints(pattern: str) -> dict[str, str]:
    """Find tasks by a path with one `*`: what it stands for names the task.

    Args:
        pattern: a path such as `models/*/model.safetensors`.

    Returns:
        task name → path, sorted by name.

    Raises:
        CheckpointError: there is not exactly one `*`, or nothing matches.
    """
    if pattern.count("*") != 1 or "**" in pattern:
        raise CheckpointError(f"{pattern}: expected exactly one '*', for the task's name")
    before, after = resolve_package_path(pattern).split("*")
    if is_remote(pattern):
        names = glob_remote(pattern)
        if not names:
            raise CheckpointError(f"{pattern}: nothing matches")
        return {name: before + name + after for name in names}
    found = sorted(glob(glob_escape(before) + "*" + glob_escape(after)))
    if not found:
        raise CheckpointError(f"{pattern}: nothing matches (relative to {Path.cwd()})")
    return {path[len(before) : len(path) - len(after) or None]: path for path in found}


def _label(source: object) -> str:
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, nn.Module):
        return f"{type(source).__name__} (module in memory)"
    return f"{type(source).__name__} of tensors in memory"


def _open(source: object, label: str) -> _Opened:
    if isinstance(source, Checkpoint):
        return _Opened(
            source.specs,
            source.__getitem__,
            source.nbytes,
            source.aliases,
            source.buffers,
            source.pieces,
            source.files,
            source.prefetch,
        )
    if isinstance(source, nn.Module):
        buffers = frozenset(name for name, _ in source.named_buffers(remove_duplicate=False))
        return _open_mapping(source.state_dict(), label, buffers=buffers)
    if isinstance(source, Mapping):
        return _open_mapping(source, label)
    if not isinstance(source, str | Path):
        raise CheckpointError(
            f"expected a path, a module or a mapping of tensors, got {type(source).__name__}"
        )
    path = open_path(str(source))
    if path.is_dir():
        path = _file_of_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path (relative to {Path.cwd()})")
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    return _open_file(path)


def _file_of_folder(folder: Path) -> Path:
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1 and not (folder / "adapter_config.json").is_file():
        return found[0]
    hint = "several .safetensors files and no index" if len(found) > 1 else "no checkpoint file"
    if (folder / "adapter_config.json").is_file():
        hint = "a PEFT adapter, not a full checkpoint (give the folder as a fine-tuned model)"
    raise CheckpointError(f"{folder}: {hint}; expected one of {', '.join(_FOLDER_FILES)}")


def _open_file(path: Path) -> _Opened:
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in _PICKLES:
        return _open_pickle(path)
    raise CheckpointError(
        f"{path}: unknown kind of checkpoint '{path.suffix}'; expected .safetensors, "
        f"{', '.join(sorted(_PICKLES))}, or a folder of them"
    )


def _open_safetensors(path: Path) -> _Opened:
    file = TensorFile(path)
    return _Opened(
        file.specs,
        file.read,
        file.nbytes,
        pieces=file.pieces,
        files=(path,),
        prefetch=file.prefetch,
    )


def _open_shards(index: Path) -> _Opened:
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        paths = {file: index.parent / file for file in sorted(set(weight_map.values()))}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{index}: not a shard index ('weight_map' expected): {error}"
        ) from error
    shards: dict[str, _Opened] = {}
    for file, path in paths.items():
        if Path(file).name != file:
            raise CheckpointError(f"{index}: names a shard outside its own folder: '{file}'")
        if not path.is_file():
            raise CheckpointError(f"{index}: names a shard that is missing: '{file}'")
        shards[file] = _open_file(path)
    absent = [f"'{n}' in {f}" for n, f in weight_map.items() if n not in shards[f].specs]
    if absent:
        raise CheckpointError(f"{index}: names tensors that their shards lack:{listing(absent)}")
    return _Opened(
        specs={name: shards[file].specs[name] for name, file in weight_map.items()},
        read=lambda name: shards[weight_map[name]].read(name),
        nbytes=sum(shard.nbytes for shard in shards.values()),
        aliases={a: t for shard in shards.values() for a, t in shard.aliases.items()},
        pieces=lambda name: _pieces(shards[weight_map[name]], name),
        files=(index, *paths.values()),
        prefetch=lambda name: shards[weight_map[name]].prefetch(name),
    )


def _pieces(opened: _Opened, name: str) -> Pieces:
    return opened.pieces(name) if opened.pieces else opened.read(name).reshape(-1).__getitem__


def _open_pickle(path: Path) -> _Opened:
    try:
        loaded = _load_pickle(path)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            is_pickle = file.read(1) in {b"P", b"\x80"}  # else a pointer, a page of HTML, …
        if not is_pickle:
            raise CheckpointError(
                f"{path}: not a PyTorch checkpoint by its first bytes; fetch or save it again"
            ) from error
        said = [line for line in str(error).splitlines() if line and "documentation" not in line]
        reason = said[-1].strip().partition(" Please use")[0]
        raise CheckpointError(
            f"{path}: holds more than tensors, and is not unpickled since that could run code "
            f"from the file ({reason}); save its state dict alone, or as safetensors"
        ) from error
    except Exception as error:  # a damaged pickle can bring up any
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path}: not a whole PyTorch checkpoint ({reason}); fetch or save it again"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: expected a state dict, got {type(loaded).__name__}")
    opened = _open_mapping(loaded, str(path), nbytes=path.stat().st_size)
    return replace(opened, files=(path,))


def _load_pickle(path: Path) -> Any:
    if is_remote(path):
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # Files older than torch 1.6 can't be memory-mapped.
        return torch.load(path, map_location="cpu", weights_only=True)


def _open_mapping(
    tensors: Mapping[str, Any],
    label: str,
    nbytes: int | None = None,
    buffers: frozenset[str] = frozenset(),
) -> _Opened:
    wrong = [
        f"'{name}': {type(value).__name__}"
        for name, value in tensors.items()
        if not isinstance(value, Tensor)
    ]
    if wrong:
        raise CheckpointError(f"{label}: expected tensors by name, got{listing(wrong)}")
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    aliases = _shared(tensors)
    if nbytes is None:
        nbytes = sum(t.nbytes for name, t in tensors.items() if name not in aliases)
    return _Opened(
        specs, lambda name: cast(Tensor, tensors[name]).detach(), nbytes, aliases, buffers
    )


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names whose tensor is, to the byte, the one that an earlier name has (tied weights)."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.device.type == "meta":
            continue
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        target = first.setdefault(place, name)
        if target != name:
            aliases[name] = target
    return aliases


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a tensor's name matches one of the shell-style patterns (case matters)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
