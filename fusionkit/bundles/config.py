"""The `config.json` of an exported model: a task's own, the base's, or a live model's, fitted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.architecture import Architecture
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.from_config import CONFIG
from fusionkit.checkpoints.json_text import parsed_json, read_json
from fusionkit.errors import BundleError

GENERATION = "generation_config.json"
_LIBRARIES = ("model_type", "_class_name", "architecture")
"""Keys by which transformers, diffusers and timm know a class."""
_DTYPES = ("dtype", "torch_dtype")


def config_of(bundle: Bundle, files: Mapping[str, bytes | Path]) -> dict[str, Any] | None:
    """The configuration of a task's class; None where none is known.

    Args:
        bundle: the bundle, its base at hand.
        files: the files beside the task's weights; see `files_of`.

    Raises:
        BundleError: it is not JSON.
    """
    if CONFIG in files:
        found = said_in(files, CONFIG, bundle)
    else:
        found = live_files(bundle.base).get(CONFIG) or bundle.manifest.base.architecture.get(
            "config"
        )
    if not isinstance(found, dict) or not any(found.get(key) for key in _LIBRARIES):
        return None
    return found


def said_in(files: Mapping[str, bytes | Path], name: str, bundle: Bundle) -> Any:
    """What one of the JSON files beside a task's weights says.

    Args:
        files: see `files_of`.
        name: of one of them.
        bundle: the task's.

    Raises:
        BundleError: it is not JSON, or can't be read.
    """
    content = files[name]
    try:
        return read_json(content) if isinstance(content, Path) else parsed_json(content)
    except (OSError, ValueError) as error:
        where = f"{bundle.path}: {name} of a task" if isinstance(content, bytes) else content
        raise BundleError(f"{where}: not readable as JSON ({error}); mend it") from error


def with_dtype(
    config: Mapping[str, Any], dtypes: Mapping[torch.dtype, int], dequantized: bool
) -> dict[str, Any]:
    """A configuration that says in which dtype most of the weights are, at every depth.

    Args:
        config: the configuration.
        dtypes: floating-point dtype of the weights → how many bytes are of it.
        dequantized: they were quantised, and are so no more.
    """
    if not dtypes:
        return dict(config)
    most = max(dtypes, key=lambda dtype: dtypes[dtype])
    name = str(most).removeprefix("torch.")
    gone = {"quantization_config"} if dequantized else set()

    def said(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {k: v for k, v in value.items() if k not in gone}
        return {k: name if k in _DTYPES else said(v) for k, v in kept.items()}

    found: dict[str, Any] = said(config)
    if "model_type" in found and not any(key in found for key in _DTYPES):
        found["dtype"] = name
    return found


def fitted_config(
    config: dict[str, Any], known: Architecture, opened: Checkpoint, apart: bool
) -> dict[str, Any]:
    """A configuration with the sizes that a task's tensors have: its vocabulary and its labels.

    Args:
        config: the configuration.
        known: the class that it makes.
        opened: the task's model, under the class's names.
        apart: whether tensors that the class ties are apart in it.
    """
    if "model_type" not in config:
        return config
    found = dict(config)
    for name, shape in known.shapes.items():
        if name not in opened or opened.specs[name].shape == tuple(shape) or not shape:
            continue
        rows = opened.specs[name].shape[0]
        if name in known.vocabulary:
            found = _replaced(found, "vocab_size", shape[0], rows)
        elif shape[0] == _labels(config):
            found.pop("num_labels", None)
            found["id2label"] = {str(label): f"LABEL_{label}" for label in range(rows)}
            found["label2id"] = {f"LABEL_{label}": label for label in range(rows)}
    if apart and not config.get("is_encoder_decoder"):
        found = _replaced(found, "tie_word_embeddings", True, False)
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as the libraries do."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _replaced(config: dict[str, Any], key: str, old: object, new: object) -> dict[str, Any]:
    """A key's value replaced, at every depth, where it is the old one."""
    return {
        name: new
        if name == key and value == old
        else _replaced(value, key, old, new)
        if isinstance(value, dict)
        else value
        for name, value in config.items()
    }


def _labels(config: Mapping[str, Any]) -> int:
    named = config.get("id2label")
    return len(named) if named else int(config.get("num_labels", 2))


def live_files(base: Checkpoint) -> dict[str, dict[str, Any]]:
    """The JSON that a live model of transformers or diffusers would have in its folder, by file."""
    known = base.architecture
    model: Any = known.module if known and not base.files else None
    library = type(model).__module__.partition(".")[0]
    if library == "diffusers" and hasattr(model, "to_json_string"):
        return {CONFIG: json.loads(model.to_json_string())}
    if known is None or model is None or known.skeleton is None:
        return {}
    config = json.loads(model.config.to_json_string())
    dtype = str(model.dtype).removeprefix("torch.")
    found = {CONFIG: {**config, "architectures": [type(model).__name__], "dtype": dtype}}
    if made := getattr(model, "generation_config", None):
        found[GENERATION] = json.loads(made.to_json_string())
    return found
