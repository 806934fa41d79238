"""Which class reads which source: the one place that knows them all."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from fusionkit.checkpoints.checkpoint import Checkpoint, Source
from fusionkit.checkpoints.gguf_file import open_gguf
from fusionkit.checkpoints.in_memory import LiveModel, TensorMapping
from fusionkit.checkpoints.paths import open_path
from fusionkit.checkpoints.pickle_file import PickleFile
from fusionkit.checkpoints.quantized import dequantized
from fusionkit.checkpoints.safetensors_file import SafetensorsFile
from fusionkit.checkpoints.shards import Shards
from fusionkit.checkpoints.view import renamed
from fusionkit.errors import CheckpointError

_PICKLES = {".pt", ".pth", ".bin", ".ckpt"}
_FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def open_source(
    source: Source, strip_prefix: str = "", add_prefix: str = "", dequantize: bool = False
) -> Checkpoint:
    """Open a source by the class of its kind; see `Checkpoint.of`."""
    opened = open_gguf(source, dequantize) or _open(source)
    if dequantize:
        opened = dequantized(opened)
    if not any(name.startswith(strip_prefix) for name in opened):
        raise CheckpointError(
            f"{opened.label}: holds no tensor"
            + (f" whose name starts with '{strip_prefix}'" if strip_prefix else "")
        )
    return renamed(opened, strip_prefix, add_prefix) if strip_prefix or add_prefix else opened


def _open(source: Source) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module):
        return LiveModel(source)
    if isinstance(source, Mapping):
        return TensorMapping(source)
    if not isinstance(source, str | Path):
        raise CheckpointError(
            f"expected a path, a module or a mapping of tensors, got {type(source).__name__}"
        )
    label, path = str(source), open_path(str(source))
    if path.is_dir():
        path = _file_of_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path (relative to {Path.cwd()})")
    if path.name.endswith(".index.json"):
        return Shards(path, label, lambda shard: _open_file(shard, label))
    return _open_file(path, label)


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


def _open_file(path: Path, label: str) -> Checkpoint:
    if path.suffix == ".safetensors":
        return SafetensorsFile(path, label)
    if path.suffix in _PICKLES:
        return PickleFile(path, label)
    raise CheckpointError(
        f"{path}: unknown kind of checkpoint '{path.suffix}'; expected .safetensors, "
        f"{', '.join(sorted(_PICKLES))}, or a folder of them"
    )


Checkpoint.opener = staticmethod(open_source)
