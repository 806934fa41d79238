"""A model's class, from the configuration that lies beside its weights.

The class is built on the meta device, without weights: by transformers (`config.json`), diffusers
(`config.json` with `_class_name`) or timm (`config.json` with `architecture`), where they are
installed. No code from the folder is run. What can't be built is not known, which is said once;
the files are then read as they are.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn

from fusionkit.checkpoints.architecture import Architecture
from fusionkit.checkpoints.config_limits import within_limits
from fusionkit.checkpoints.json_text import read_json
from fusionkit.errors import CheckpointError

CONFIG = "config.json"
_UNKNOWN = "tensors have the names that files have, and ties and experts may go unseen"


class UnknownClassWarning(UserWarning):
    """A folder's configuration names a class that can't be built here: its files are read as is."""


def architecture_of(folder: Path) -> Architecture | None:
    """What is known of the class of a folder's model; None where there is no configuration.

    Args:
        folder: of the local disk, or remote.

    Raises:
        CheckpointError: the configuration is not JSON.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); fetch it again") from error
    return built(config, str(path)) if isinstance(config, dict) else None


def from_record(record: Mapping[str, Any], label: str) -> Architecture | None:
    """Build a class again from what `Architecture.record` says."""
    config = record.get("config")
    return built(config, label) if isinstance(config, Mapping) else None


def model_of(config: Mapping[str, Any], label: str, **settings: Any) -> nn.Module:
    """Build a class's module from its configuration, in memory where the caller's context has it.

    Args:
        config: the content of `config.json`.
        label: what messages call it.
        settings: of transformers' classes: `dtype`, `attn_implementation`.

    Raises:
        CheckpointError: it is of no library that is known, or can't be built here.
    """
    try:
        if _builder(config) is not None:
            return made(config, **settings)
    except ImportError as error:
        missing = (error.name or "what it needs").partition(".")[0]
        raise CheckpointError(f"{label}: needs {missing}; pip install {missing}") from error
    except Exception as error:  # classes raise what they like over a configuration
        raise CheckpointError(
            f"{label}: its class can't be built here ({type(error).__name__}: {error}); write the "
            "task's model with 'fusionkit export', and load it by its own code"
        ) from error
    raise CheckpointError(
        f"{label}: its {CONFIG} names no class of transformers, diffusers or timm; build the model "
        "yourself, and give it to fusionkit.ReuseModule, or to fusionkit.switch"
    )


def built(config: Mapping[str, Any], label: str) -> Architecture | None:
    """Build a class from its configuration; None, and a warning, where that can't be.

    Args:
        config: the content of `config.json`.
        label: where that is, for the warning.
    """
    return _built(json.dumps(config, sort_keys=True), label)


@lru_cache(maxsize=32)
def _built(text: str, label: str) -> Architecture | None:
    config: dict[str, Any] = json.loads(text)
    if _builder(config) is None:
        return None
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = made(config)
    except ImportError as error:
        _say_missing((error.name or "what it needs").partition(".")[0])
        return None
    except Exception as error:  # classes raise what they like over a configuration
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        warnings.warn(
            f"{label}: its class can't be built here ({type(error).__name__}: {reason}), so that "
            f"the model is read by its files alone: {_UNKNOWN}",
            UnknownClassWarning,
            stacklevel=2,
        )
        return None
    return Architecture.of(model, {"config": config})


@lru_cache
def _say_missing(library: str) -> None:
    """Say once that a library is not installed."""
    warnings.warn(
        f"{library} is not installed, so that models are read by their files alone: {_UNKNOWN}; "
        f"pip install {library}",
        UnknownClassWarning,
        stacklevel=3,
    )


def made(config: Mapping[str, Any], outputs: int | None = None, **settings: Any) -> nn.Module:
    """A model of a configuration's class, its weights drawn at random.

    Args:
        config: the content of `config.json`.
        outputs: of a classifier's head over it; None: the class as it is.
        settings: of transformers' classes: `dtype`, `attn_implementation`.

    Raises:
        ValueError: no library has such a class, or it would be larger than any.
            Classes raise what they like beside.
        ImportError: the library that has it is not installed.
    """
    build = _builder(config)
    if build is None:
        raise ValueError("it has none of 'model_type', 'architecture' and '_class_name'")
    with within_limits(config):
        return build(config, outputs, **settings if build is _of_transformers else {})


def _builder(config: Mapping[str, Any]) -> Callable[..., nn.Module] | None:
    if "_class_name" in config:
        return _of_diffusers
    if config.get("model_type"):
        return _of_transformers
    return _of_timm if "architecture" in config else None


def _of_transformers(config: Mapping[str, Any], outputs: int | None, **settings: Any) -> nn.Module:
    import transformers
    from transformers import AutoConfig, PreTrainedModel

    # Quantised weights are another matter: the class is that of the model before.
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    own = {} if outputs is None else {"num_labels": outputs}
    with TemporaryDirectory(prefix="fusionkit-") as folder:  # as transformers itself reads it
        (Path(folder) / CONFIG).write_text(json.dumps(plain), encoding="utf-8")
        made = AutoConfig.from_pretrained(folder, trust_remote_code=False, **own)
    kind: Any = None
    said = config.get("architectures") or ()
    for name in [said] if isinstance(said, str) else said:
        if outputs is None or _CLASSIFIES in str(name):
            kind = kind or getattr(transformers, str(name), None)
    if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
        known: Any = kind
        return cast(nn.Module, known._from_config(made, **settings) if settings else known(made))
    if config.get("auto_map"):
        raise ValueError("it needs code of its own")
    for each in ("AutoModel",) if outputs is None else _CLASSIFIERS:
        auto: Any = getattr(transformers, each)
        if outputs is None or type(made) in auto._model_mapping:
            return cast(nn.Module, auto.from_config(made, **settings))
    raise ValueError(f"transformers has no classifier of a {type(made).__name__}")


_CLASSIFIES = "Classification"
"""In the name of a class that has a head with some outputs."""
_CLASSIFIERS = ("AutoModelForSequenceClassification", "AutoModelForImageClassification")
"""What has such a head over any encoder."""


def _of_diffusers(config: Mapping[str, Any], outputs: int | None) -> nn.Module:
    import diffusers

    if outputs is not None:
        raise ValueError("a model of diffusers has no head")
    kind = getattr(diffusers, str(config["_class_name"]))
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return cast(nn.Module, kind.from_config(plain))


def _of_timm(config: Mapping[str, Any], outputs: int | None) -> nn.Module:
    import timm

    settings = dict(config.get("model_args") or {})
    for key in ("num_classes", "global_pool"):
        if config.get(key) is not None:
            settings.setdefault(key, config[key])
    if outputs is not None:
        settings["num_classes"] = outputs
    try:
        made = timm.create_model(config["architecture"], pretrained=False, **settings)
    except TypeError:  # of a class that has no choice of pooling
        settings.pop("global_pool", None)
        made = timm.create_model(config["architecture"], pretrained=False, **settings)
    return made
