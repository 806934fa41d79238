"""Which class reads which source: the one place that knows them all."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from fusionkit.checkpoints.architecture import Architecture
from fusionkit.checkpoints.checkpoint import Checkpoint, Source
from fusionkit.checkpoints.conformed import conformed
from fusionkit.checkpoints.from_config import architecture_of
from fusionkit.checkpoints.gguf_file import open_gguf
from fusionkit.checkpoints.headed import Headed
from fusionkit.checkpoints.hub_cache import lacking_on_hub
from fusionkit.checkpoints.in_memory import LiveModel, TensorMapping
from fusionkit.checkpoints.model_folder import file_of_folder, is_index, is_weights
from fusionkit.checkpoints.names import unwrapped
from fusionkit.checkpoints.path_text import expanded
from fusionkit.checkpoints.paths import open_path
from fusionkit.checkpoints.pickle_file import PickleFile
from fusionkit.checkpoints.quantized import dequantized
from fusionkit.checkpoints.safetensors_file import SafetensorsFile
from fusionkit.checkpoints.shards import Shards
from fusionkit.checkpoints.view import View, renamed
from fusionkit.checkpoints.with_head import WithHead
from fusionkit.errors import CheckpointError

_PICKLES = {".pt", ".pth", ".bin", ".ckpt"}


def open_source(
    source: Source,
    strip_prefix: str = "",
    add_prefix: str = "",
    variant: str | None = None,
    dequantize: bool = False,
) -> Checkpoint:
    """Open a source by the class of its kind; see `Checkpoint.of`."""
    opened = _open(source, variant, dequantize)
    if not any(name.startswith(strip_prefix) for name in opened):
        raise CheckpointError(
            f"{opened.label}: holds no tensor"
            + (f" whose name starts with '{strip_prefix}'" if strip_prefix else "")
        )
    return renamed(opened, strip_prefix, add_prefix) if strip_prefix or add_prefix else opened


def _open(source: Source, variant: str | None, dequantize: bool) -> Checkpoint:
    if isinstance(source, str | Path):
        return open_gguf(source, dequantize) or _open_path(str(source), variant, dequantize)
    if isinstance(source, Headed):
        return WithHead(_open(source.model, variant, dequantize), Checkpoint.of(source.head))
    if variant:
        raise CheckpointError(
            f"variant '{variant}': chooses among a folder's files, and the source is no folder "
            f"({type(source).__name__}); leave it out"
        )
    if isinstance(source, Checkpoint):
        return dequantized(source) if dequantize else source
    if isinstance(source, nn.Module):
        return dequantized(LiveModel(source)) if dequantize else LiveModel(source)
    if isinstance(source, Mapping):
        return _conformed(TensorMapping(source), None, dequantize)
    raise CheckpointError(
        f"expected a path, a module or a mapping of tensors, got {type(source).__name__}"
    )


def _open_path(source: str, variant: str | None, dequantize: bool) -> Checkpoint:
    label, path = expanded(source), open_path(source)
    of_folder = path.is_dir()
    if of_folder:
        path = file_of_folder(path, variant, lambda file: _open_file(file, str(file)))
    elif variant:
        raise CheckpointError(
            f"{path}: variant '{variant}' chooses among a folder's files, and this is no folder; "
            "leave it out"
        )
    if not path.is_file() and path.exists():
        raise CheckpointError(
            f"{path}: is no file but a pipe, or a device, and models are read more than once; "
            "write it to a file first"
        )
    if not path.is_file():
        lacking = lacking_on_hub(label)
        near = f"no such file; check the path (relative to {Path.cwd()})"
        raise CheckpointError(f"{label}: {lacking}" if lacking else f"{path}: {near}")
    # A configuration speaks of the folder's own model, not of any file that lies beside it.
    known = architecture_of(path.parent) if of_folder or is_weights(path) else None
    opened = _conformed(_open_file(path, label), known, dequantize)
    opened.variant = variant
    return opened


def _conformed(opened: Checkpoint, known: Architecture | None, dequantize: bool) -> Checkpoint:
    """A checkpoint as its class has it; dequantised first, under the names that files have."""
    names = unwrapped(opened)
    if any(name != there for name, there in names.items()):
        opened = View(opened, names)
    return conformed(dequantized(opened) if dequantize else opened, known)


def _open_file(path: Path, label: str) -> Checkpoint:
    if is_index(path):
        return Shards(path, label, lambda shard: _open_file(shard, label))
    if path.suffix == ".safetensors":
        return SafetensorsFile(path, label)
    if path.suffix in _PICKLES:
        return PickleFile(path, label)
    raise CheckpointError(
        f"{path}: unknown kind of checkpoint '{path.suffix}'; expected .safetensors, "
        f"{', '.join(sorted(_PICKLES))}, or a folder of them"
    )


Checkpoint.opener = staticmethod(open_source)
