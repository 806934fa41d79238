"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

`fusionkit.json` beside them, which `fusionkit fit` writes and PEFT ignores, says where training
started: the seed that draws the initial tensors, or the file that holds them. A linearized adapter
(L-LoRA) is another function of its tensors than a LoRA: its `peft_type` is `LINEARIZED_LORA`, so
that plain PEFT refuses it. FusionBench has those in a file of its own, with their start
(`fusion_bench`).
"""

import re
from pathlib import Path
from typing import Any

from fusionkit.checkpoints.adapters import fusion_bench
from fusionkit.checkpoints.adapters.adapter import CONFIG, LINEARIZED, Adapter
from fusionkit.checkpoints.adapters.refusals import refuse_config
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.json_text import read_json
from fusionkit.checkpoints.paths import open_path
from fusionkit.checkpoints.view import View
from fusionkit.errors import CheckpointError

TENSORS = ("adapter_model.safetensors", "adapter_model.bin", fusion_bench.FILE)
RECORD = "fusionkit.json"
PREFIX = "base_model.model."

_SAVED = re.compile(r"\.(modules_to_save|original_module)\.")
# Not before factors: there it tells those of several parameters of one module apart.
_WRAPPED = re.compile(r"(?:\.base_layer)+(?=\.)(?!\.(?:base_layer|lora_))")


def folder_of(source: str | Path) -> tuple[str, str] | None:
    """The folder of a PEFT adapter that a path means, and the name of the file of tensors in it.

    Args:
        source: of the folder, or of the file of tensors within.

    Returns:
        the folder and the file's name, empty if it is not said which; None where there is no
        adapter's folder.
    """
    path = open_path(str(source))
    if (path / CONFIG).is_file():
        return str(source), ""
    if path.name in TENSORS and (path.parent / CONFIG).is_file():
        return str(path.parent), path.name
    return None


class AdapterFolder(Adapter):
    """An adapter's folder, opened.

    Args:
        path: the folder.
        file: the name of the file of tensors in it; by default the first of `TENSORS` there.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is of a kind that is not
            read.
    """

    def __init__(self, path: str | Path, file: str = "") -> None:
        folder, label = open_path(str(path)), str(path)
        config = _read_json(folder / CONFIG)
        refuse_config(config, label)  # before its tensors, which may be of any kind
        names = (file,) if file else TENSORS
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{path}: has {CONFIG} but none of {', '.join(TENSORS)}")
        start = _read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
        files = tuple(path for path in sorted(folder.iterdir()) if path.is_file())
        opened, initial = Checkpoint.of(str(found)), None
        if found.name == fusion_bench.FILE:
            own, at_start = fusion_bench.factor_names(opened, str(found))
            initial = _plain(View(opened, at_start), label, files)
            opened, config = View(opened, own), {**config, "peft_type": LINEARIZED}
        tensors = _plain(opened, label, files)
        super().__init__(label, config, tensors, start, folder, initial)


def _plain(file: Checkpoint, label: str, files: tuple[Path, ...]) -> Checkpoint:
    """An adapter's tensors, without what PEFT wraps around the base's names."""
    names = {_WRAPPED.sub("", name.removeprefix(PREFIX)): name for name in file}
    if len(names) < len(file):
        twice = min(set(file) - set(names.values()))
        raise CheckpointError(f"{label}: has '{twice}' under another name too; save it again")
    # Of a resized embedding, PEFT saves what `modules_to_save` wraps, too, beside what counts.
    beside = {name for name in names if (bare := _SAVED.sub(".", name)) != name and bare in names}
    names = {name: there for name, there in names.items() if name not in beside}
    return View(file, names, label=label, files=files)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise TypeError("not an object")  # noqa: TRY301
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); copy it again") from error
    return content
