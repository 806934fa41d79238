"""Which file a folder means: the one that transformers or diffusers would load.

In each library a file comes before an index of shards or after it, safetensors before pickles, and
a `variant` puts itself before the last dot (`model.fp16.safetensors`,
`model.safetensors.index.fp16.json`). A folder whose file and shards hold different weights is
refused: which of them is loaded depends on the library.
"""

import re
from collections.abc import Callable, Collection
from pathlib import Path

from fusionkit.checkpoints.checkpoint import Checkpoint, same_values
from fusionkit.checkpoints.json_text import read_json
from fusionkit.checkpoints.paths import is_file_name
from fusionkit.errors import CheckpointError

_LIBRARIES = (("model", "pytorch_model"), ("diffusion_pytorch_model", "diffusion_pytorch_model"))
"""Of transformers and diffusers: what safetensors files and pickles are called."""
_ADAPTER, _PIPELINE = "adapter_config.json", "model_index.json"
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_KINDS = ("safetensors", "bin")
_EXPECTED = "model.safetensors, model.safetensors.index.json, pytorch_model.bin or its index"

BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""What lies beside a model's weights: its configuration, tokenizer and processor."""

_STEM = r"(?:diffusion_pytorch_model|pytorch_model|model)"
_VARIANT = re.compile(
    rf"{_STEM}\.([^.]+?)(?:-\d{{5}}-of-\d{{5}})?\.(?:safetensors|bin)"
    rf"|{_STEM}\.(?:safetensors|bin)\.index\.([^.]+)\.json"
)
_SHARD = re.compile(r".*-\d{5}-of-(?!00001\.)\d{5}\.(?:safetensors|bin)")
_WEIGHTS = re.compile(rf"{_STEM}(?:\.[^.]+)?\.(?:safetensors|bin)(?:\.index(?:\.[^.]+)?\.json)?")
_INDEX = re.compile(r".*\.index(?:\.[^.]+)?\.json")


def is_index(path: Path) -> bool:
    """Whether a file is an index of shards, by its name."""
    return _INDEX.fullmatch(path.name) is not None


def is_weights(path: Path) -> bool:
    """Whether a file is what a folder's model is called, by its name; or its index."""
    return _WEIGHTS.fullmatch(path.name) is not None


def weights_among(names: Collection[str], variant: str | None = None) -> list[str]:
    """The files that a folder's weights are read from, of a model or of an adapter.

    Args:
        names: of all its files; none is opened.
        variant: as of `from_pretrained`.

    Returns:
        a file; or an index, and all shards of its kind; of an adapter its file. Nothing where it is
        not known from names.
    """
    found = [name for of in _LIBRARIES if (name := _name_of(*of, variant, names))]
    if not found and not variant:
        tensors = [name for name in names if name.endswith(".safetensors")]
        adapter = next((name for name in _ADAPTERS if name in names), None)
        found = [adapter] if adapter else tensors * (len(tensors) == 1)
    for index in [name for name in found if _INDEX.fullmatch(name)]:
        stem, _, kind = index.partition(".index")[0].rpartition(".")
        shard = re.compile(
            rf"{re.escape(_with_variant(f'{stem}.{kind}', variant)[: -len(kind) - 1])}"
            rf"-\d{{5}}-of-\d{{5}}\.{kind}"
        )
        found += sorted(name for name in names if shard.fullmatch(name))
    return found


def _name_of(stem: str, pickle: str, variant: str | None, names: Collection[str]) -> str | None:
    """What one of the libraries would load."""
    for kind, name in zip(_KINDS, (stem, pickle), strict=True):
        for file in (f"{name}.{kind}", f"{name}.{kind}.index.json"):
            if (own := _with_variant(file, variant)) in names:
                return own
    return None


def file_of_folder(folder: Path, variant: str | None, opened: Callable[[Path], Checkpoint]) -> Path:
    """The file or index that a folder means.

    Args:
        folder: the folder.
        variant: as of `from_pretrained`; None for the weights without one.
        opened: opens one of the folder's files, or an index.

    Raises:
        CheckpointError: there is none, or the folder says two things.
    """
    if told := _told_by_config(folder):
        return told
    found = [path for path in (_first(folder, *of, variant, opened) for of in _LIBRARIES) if path]
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: holds {found[0].name}, which transformers reads, and {found[1].name}, "
            f"which diffusers does; give the one that is meant: {found[0]} or {found[1]}"
        )
    if not found and not variant:
        found = _only(folder)
    if not found:
        raise CheckpointError(f"{folder}: {_reason(folder, variant)}")
    if (folder / _ADAPTER).is_file():
        raise CheckpointError(
            f"{folder}: holds {found[0].name} and an adapter ({_ADAPTER}), which from_pretrained "
            f"adds to it; give {found[0]} for the model without the adapter"
        )
    return found[0]


def _told_by_config(folder: Path) -> Path | None:
    """The file that `transformers_weights` in `config.json` names, before any other."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None  # a folder of weights alone; who reads the config says what is wrong with it
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    if not isinstance(name, str):
        return None
    if not is_file_name(name) or not (folder / name).is_file():
        raise CheckpointError(
            f"{folder}: config.json says `transformers_weights: {name[:255]}`, and the folder has "
            "no such file; fetch it, or take the entry out of config.json"
        )
    return folder / name


def _first(
    folder: Path, stem: str, pickle: str, variant: str | None, opened: Callable[[Path], Checkpoint]
) -> Path | None:
    """What one of the libraries would load."""
    for kind, name in zip(_KINDS, (stem, pickle), strict=True):
        single = folder / _with_variant(f"{name}.{kind}", variant)
        index = folder / _with_variant(f"{name}.{kind}.index.json", variant)
        if single.is_file() and index.is_file():
            _refuse_two(folder, single, index, opened)
        if single.is_file():
            return single
        if index.is_file():
            return index
    return None


def _with_variant(name: str, variant: str | None) -> str:
    """A file's name with a variant, as both libraries write it."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{variant}.{last}" if variant else name


def _refuse_two(
    folder: Path, single: Path, index: Path, opened: Callable[[Path], Checkpoint]
) -> None:
    """Refuse a file and shards that hold different weights.

    Where the shards are gone, or not all there, the index is what an earlier save left behind.
    """
    try:
        shards = opened(index)
    except CheckpointError:
        return
    one = opened(single)
    differ = (name for name in sorted({*one, *shards}) if not same_values(one, name, shards, name))
    if (name := next(differ, None)) is not None:
        raise CheckpointError(
            f"{folder}: says two things: {single.name} and the shards of {index.name} hold "
            f"different weights ('{name}', for one); give the one that is meant ({single} or "
            f"{index}), or delete the other"
        )


def _only(folder: Path) -> list[Path]:
    """The one safetensors file of a folder, whatever it is called; but not of an adapter."""
    found = list(folder.glob("*.safetensors"))
    if len(found) != 1 or any((folder / name).is_file() for name in (_ADAPTER, _PIPELINE)):
        return []
    name = found[0].name
    return [] if _VARIANT.fullmatch(name) or _SHARD.fullmatch(name) else found


def _reason(folder: Path, variant: str | None) -> str:
    """Why a folder means no file, and what to give instead."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    below = sorted(path.name for path in folder.iterdir() if path.is_dir() and _has_weights(path))
    if _ADAPTER in names:
        return (
            "a PEFT adapter, not a full checkpoint (give the folder as a fine-tuned model); "
            f"expected {_EXPECTED}"
        )
    if _PIPELINE in names:
        return f"a diffusers pipeline; give the folder of one component: {', '.join(below)}"
    if reason := _reason_of_weights(names, variant):
        return reason
    if below:
        return f"no checkpoint file, but folders that hold some; give one: {', '.join(below)}"
    return f"no checkpoint file; expected {_EXPECTED}"


def _reason_of_weights(names: list[str], variant: str | None) -> str | None:
    """Why none of a folder's files is meant; None where none holds weights."""
    weights = [name for name in names if name.endswith(".safetensors")]
    matches = [match for match in map(_VARIANT.fullmatch, names) if match]
    variants = sorted({match[1] or match[2] for match in matches})
    if variant:
        has = f"it has the variants {', '.join(variants)}" if variants else "leave `variant` out"
        return f"no weights of the variant '{variant}' (model.{variant}.safetensors, say); {has}"
    if variants:
        return (
            f"its weights are of a variant ({', '.join(variants)}); say which: "
            f"Checkpoint.of(…, variant='{variants[0]}'), in a recipe "
            f"`class_path: Checkpoint, init_args: {{source: …, variant: {variants[0]}}}`"
        )
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        return f"holds shards ({shards[0]}, …) and no index; fetch their .index.json, too"
    if len(weights) > 1:
        return (
            f"several .safetensors files and no index ({', '.join(weights)}); give the file "
            f"itself, or a folder with {_EXPECTED}"
        )
    return None


def _has_weights(folder: Path) -> bool:
    return any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir())
