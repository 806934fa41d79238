"""Write one task's whole model as a folder that `from_pretrained` loads."""

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.config import (
    config_of,
    fitted_config,
    live_files,
    with_dtype,
    write_json,
)
from fusionkit.bundles.side_files import files_of
from fusionkit.bundles.space import model_needs
from fusionkit.bundles.weights import TaskWeights
from fusionkit.checkpoints.architecture import Architecture
from fusionkit.checkpoints.checkpoint import Checkpoint, same_values
from fusionkit.checkpoints.conversion import saved
from fusionkit.checkpoints.from_config import CONFIG
from fusionkit.checkpoints.output_folder import check_replaceable, new_folder
from fusionkit.checkpoints.paths import copy_file
from fusionkit.errors import BundleError, listing

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


class IncompleteFolderWarning(UserWarning):
    """An exported folder lacks what nobody knows: a tokenizer, or a class for a task's head."""


def export_folder(
    bundle: Bundle,
    task: str,
    out: Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a task's model as its library's `from_pretrained` loads it (timm: `local-dir:`).

    Configuration, tokenizer, processor and chat template are the task's own where it has others
    than the base. Tensors have the names that files of the class have, tied ones are written
    once. Memory is about one shard. Before the folder appears, its files are opened, and held
    against the class that its configuration makes.

    Args:
        bundle: the bundle, its base at hand.
        task: one of its tasks.
        out: the folder, of the local disk or a URL; it appears whole or not at all.
        dtype: of all floating-point tensors; by default the base's.
        overwrite: replace a folder with a config.json that is there.
        max_shard_size: of one file, in bytes or as `5GB`, `500MiB`; timm reads one file alone.

    Returns:
        the folder.

    Raises:
        BundleError: the folder exists, no configuration is known, or the task's tensors are not
            of the class that it makes; or as of `TaskWeights`.
        WrongBaseError: the base at hand is another model.
    """
    limit = shard_bytes(max_shard_size)
    check_replaceable(out, overwrite, known_by=CONFIG)
    weights = TaskWeights(bundle, task, dtype)
    files = files_of(bundle, task)
    config = config_of(bundle, files)
    if config is None:
        raise BundleError(
            f"{out}: a folder needs a {CONFIG} of transformers, diffusers or timm, and none is "
            f"known of the base ({bundle.base.label}); give its folder as the base, or write one "
            f"file: --out {out.name}.safetensors"
        )
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    if not any(key in config for key in ("_class_name", "model_type")):
        limit = sys.maxsize  # timm reads one file
    needed = model_needs(weights, bundle.codec.restores and dtype is None)
    with new_folder(out, overwrite, known_by=CONFIG, needed=needed) as folder:
        for name, content in files.items():
            if isinstance(content, Path):
                copy_file(content, folder / name)
            else:
                (folder / name).write_bytes(content)
        for name, said in live_files(bundle.base).items():
            if name not in files:
                write_json(folder / name, said)
        shards = _Shards(folder, stem, limit)
        for name, tensor in _as_in_files(bundle, weights):
            shards.add(name, tensor)
        shards.finish()
        config = with_dtype(config, shards.dtypes, bundle.manifest.base.dequantized)
        write_json(folder / CONFIG, config)
        _check(bundle, task, folder, config)
    _tell_what_is_missing(bundle, files)
    return out


def shard_bytes(size: int | str) -> int:
    """A size in bytes, given as a number or as `50MB`, `5GB`, `1GiB`.

    Raises:
        BundleError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", str(size).strip().upper())
    if not found or found[2] not in _UNITS or not (count := float(found[1]) * _UNITS[found[2]]):
        raise BundleError(
            f"max_shard_size '{size}' is no size; give bytes, or a number with KB, MB, GB, MiB, GiB"
        )
    return int(count)


def _as_in_files(bundle: Bundle, weights: TaskWeights) -> Iterator[tuple[str, Tensor]]:
    """The tensors under the names that files of their class have, made as they are asked for."""
    known = bundle.base.architecture
    if known is None or known.skeleton is None:
        yield from weights.items()
        return
    specs = {name: (spec.shape, spec.dtype) for name, spec in bundle.whole_base.specs.items()}
    for _, make in saved(known.skeleton, weights, specs):
        yield from make(weights.__getitem__).items()


class _Shards:
    """Writes tensors into files of a limited size, and the index that says which is in which.

    Args:
        folder: where to.
        stem: what the files' names begin with.
        limit: bytes of a file, unless one tensor has more.

    Attributes:
        dtypes: floating-point dtype → how many bytes are of it.
    """

    def __init__(self, folder: Path, stem: str, limit: int) -> None:
        self._folder, self._stem, self._limit = folder, stem, limit
        self._pending: dict[str, Tensor] = {}
        self._size = self._total = self._entries = 0
        self._written: list[list[str]] = []
        self.dtypes: dict[torch.dtype, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; what is full is written."""
        if self._pending and self._size + tensor.nbytes > self._limit:
            self._flush()
        if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._pending[name] = tensor
        self._size += tensor.nbytes
        self._total += tensor.nbytes
        self._entries += tensor.numel()
        if tensor.is_floating_point():
            self.dtypes[tensor.dtype] = self.dtypes.get(tensor.dtype, 0) + tensor.nbytes

    def finish(self) -> None:
        """Write what is left, and give the files their names."""
        if self._pending or not self._written:
            self._flush()
        count = len(self._written)
        if count == 1:
            self._path(0).rename(self._folder / f"{self._stem}.safetensors")
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self._written):
            file = f"{self._stem}-{number + 1:05}-of-{count:05}.safetensors"
            self._path(number).rename(self._folder / file)
            places.update(dict.fromkeys(names, file))
        sizes = {"total_parameters": self._entries, "total_size": self._total}
        index = {"metadata": sizes, "weight_map": dict(sorted(places.items()))}
        write_json(self._folder / f"{self._stem}.safetensors.index.json", index)

    def _flush(self) -> None:
        path = self._path(len(self._written))
        save_file(self._pending, path, metadata={"format": "pt"})
        self._written.append(list(self._pending))
        self._pending, self._size = {}, 0

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._stem}.{number}.tmp"


def _check(bundle: Bundle, task: str, folder: Path, config: dict[str, Any]) -> None:
    """Hold the files against the class that the configuration makes; mend its sizes first.

    Raises:
        BundleError: a tensor has another shape there, or is missing.
    """
    opened = Checkpoint.of(str(folder))
    known = opened.architecture
    if known is None:
        return  # said already: a class that can't be built here
    fitted = fitted_config(config, known, opened, _apart(opened, known))
    if fitted != config:
        write_json(folder / CONFIG, fitted)
        opened = Checkpoint.of(str(folder))
        known = opened.architecture or known
    findings = [
        f"'{name}' is {list(opened.specs[name].shape)}, its class has it {list(shape)}"
        for name, shape in known.shapes.items()
        if name in opened and opened.specs[name].shape != tuple(shape)
    ]
    there = opened.keys() | opened.aliases.keys()
    base = bundle.whole_base
    findings += [f"'{n}' is missing" for n in known.shapes if n not in there and n in base]
    if findings:
        raise BundleError(
            f"task '{task}' is not of the class that its {CONFIG} makes ({known.name}):"
            f"{listing(findings)}\ncompress it from a folder that has its own {CONFIG}, or write "
            "one file (.safetensors)"
        )
    if strange := sorted(name for name in opened if name not in known.shapes):
        warnings.warn(
            f"{known.name}, which {CONFIG} names, has no place for what task '{task}' has:"
            f"{listing([repr(n) for n in strange])}\nload it by a class that has, or change "
            f"`architectures` in {CONFIG}",
            IncompleteFolderWarning,
            stacklevel=3,
        )


def _apart(opened: Checkpoint, known: Architecture) -> bool:
    """Whether tensors that the class ties are there with different values."""
    return any(
        name in opened and to in opened and not same_values(opened, name, opened, to)
        for name, to in known.tied.items()
    )


def _tell_what_is_missing(bundle: Bundle, files: Mapping[str, object]) -> None:
    if CONFIG not in files:
        warnings.warn(
            f"no tokenizer or processor is known, as the base is no folder ({bundle.base.label}); "
            "save it beside the model yourself",
            IncompleteFolderWarning,
            stacklevel=3,
        )
