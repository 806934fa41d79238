"""Files beside a model's weights: configuration, tokenizer, processor, chat template.

A fine-tune may have its own: more tokens, other labels, another chat template. Those that differ
from the base's are kept in the bundle, among what a task has whole (see `format`), so that an
exported model is complete after the fine-tune's folder is gone.
"""

import re
import warnings
import zlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.config import GENERATION, live_files
from fusionkit.bundles.format import SIDE_FILE, task_file
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.from_config import CONFIG
from fusionkit.checkpoints.json_text import parsed_json
from fusionkit.checkpoints.paths import is_file_name, open_path
from fusionkit.codecs.base import WHOLE
from fusionkit.errors import BundleError, FusionKitError

TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "sentencepiece*",
    "chat_template.*",
)
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_KINDS = ((CONFIG,), (GENERATION,), TOKENIZER, PROCESSOR)
"""Patterns of files by kind: of a kind, a model has its own files or another's, never a mixture."""
_WEIGHTS = re.compile(r"(model|pytorch_model|diffusion_pytorch_model|adapter_model)\b.*")
_VOLATILE = ("_name_or_path", "name_or_path", "transformers_version", "_diffusers_version")
"""Keys of JSON files that say who wrote them, and change nothing."""
_LARGEST = 64 << 20
_ABSENT = b""
"""Stands for a file of the base that the fine-tune, which has others of its kind, lacks."""


class SideFileWarning(UserWarning):
    """A file beside a fine-tune's weights is too large to be kept in a bundle."""


def folder_of(files: Iterable[Path]) -> Path | None:
    """The folder that a checkpoint's files make up; None where they are no such folder's."""
    return next((path.parent for path in files if _WEIGHTS.fullmatch(path.name)), None)


def side_files(folder: Path | None) -> dict[str, Path]:
    """The files beside the weights in a folder, by name."""
    if folder is None:
        return {}
    patterns = [pattern for kind in _KINDS for pattern in kind]
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if any(fnmatchcase(path.name, each) for each in patterns) and path.is_file()
    }


def own_files(base: Checkpoint, tuned: Checkpoint) -> dict[str, bytes]:
    """What a fine-tune has beside its weights, and the base has not, or otherwise.

    JSON files are compared by what they say, not by how it is laid out.

    Returns:
        file's name → its content; empty for a file of the base that must not be used.
    """
    folder = folder_of(tuned.files)
    theirs, ours = side_files(folder_of(base.files)), side_files(folder)
    known = {n: _lasting(said) for n, said in live_files(base).items()}
    found = {}
    for name, path in ours.items():
        if path.stat().st_size > _LARGEST:
            warnings.warn(
                f"{path}: has more than {_LARGEST >> 20} MiB, and is not kept in the bundle; copy "
                "it beside an exported model yourself",
                SideFileWarning,
                stacklevel=2,
            )
        elif _says(path) != (_says(theirs[name]) if name in theirs else known.get(name)):
            found[name] = path.read_bytes()
    for kind in _KINDS:
        if any(_of_kind(name, kind) for name in ours):
            lacking = [n for n in theirs if n not in ours and _of_kind(n, kind)]
            found.update(dict.fromkeys(lacking, _ABSENT))
    return found


def as_tensor(content: bytes) -> Tensor:
    """A file's content as a bundle keeps it: compressed, uint8 `(n,)`; nothing of an empty one."""
    packed = bytearray(zlib.compress(content, 9) if content else b"")
    return torch.frombuffer(packed, dtype=torch.uint8) if packed else torch.empty(0).byte()


def stored_files(bundle: Bundle, task: str) -> dict[str, bytes]:
    """What `own_files` found for a task when the bundle was made.

    Raises:
        BundleError: one can't be read.
    """
    return {
        name.removeprefix(SIDE_FILE): _content(bundle, task, name)
        for name in bundle.task_names(task)
        if name.startswith(SIDE_FILE)
    }


def base_folder(bundle: Bundle) -> Path | None:
    """The folder of a bundle's base; None of one that is a bare file, or in memory alone."""
    if files := bundle.base.files:
        return folder_of(files)
    # A copy in memory, it may be, of what was read from there.
    source = bundle.manifest.base.source
    try:
        path = open_path(source)
        found = folder_of([path]) if path.is_file() else path
        return found if found and (found / CONFIG).is_file() else None
    except (FusionKitError, OSError, ValueError):
        return None


def base_file(bundle: Bundle) -> Path | None:
    """The file that a bundle's base was read from, if it is one, and there."""
    try:
        path = bundle.base.files[0] if bundle.base.files else open_path(bundle.manifest.base.source)
        return path if path.is_file() else None
    except (FusionKitError, OSError, ValueError):
        return None


def base_files(bundle: Bundle) -> Mapping[str, Path]:
    """The files beside the base's weights."""
    return side_files(base_folder(bundle))


def files_of(bundle: Bundle, task: str) -> Mapping[str, bytes | Path]:
    """The files beside a task's weights: its own, and the base's where it has none."""
    merged: dict[str, bytes | Path] = dict(base_files(bundle))
    merged.update(stored_files(bundle, task))
    return {name: content for name, content in merged.items() if content != _ABSENT}


def _content(bundle: Bundle, task: str, name: str) -> bytes:
    file = name.removeprefix(SIDE_FILE)
    try:
        if not is_file_name(file):
            raise ValueError("it is no name of a file")  # noqa: TRY301
        packed = bundle.task_parts(task, name)[WHOLE].numpy().tobytes()
        if not packed:
            return _ABSENT
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(packed, _LARGEST)
        if not unpacking.eof:
            raise ValueError(f"it has more than {_LARGEST >> 20} MiB")  # noqa: TRY301
    except (KeyError, ValueError, zlib.error) as error:
        raise BundleError(
            f"{bundle.path / task_file(task)}: '{file}' of task '{task}' can't be read ({error}); "
            "copy or compress it again"
        ) from error
    return content


def _of_kind(name: str, kind: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in kind)


def _says(path: Path) -> object:
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    try:
        said = parsed_json(content)
    except ValueError:
        return content
    return _lasting(said)


def _lasting(said: object) -> object:
    """What JSON says, but for who wrote it."""
    if isinstance(said, dict):
        return {key: value for key, value in said.items() if key not in _VOLATILE}
    return said
