"""The network of a base model, from the `config.json` beside its weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fusionkit.checkpoints.from_config import CONFIG, made
from fusionkit.checkpoints.json_text import read_json
from fusionkit.checkpoints.model_folder import is_weights
from fusionkit.checkpoints.paths import open_path
from fusionkit.errors import CheckpointError, FusionKitError
from fusionkit.tasks.models import padded

_MEND = "say what builds it: --model CLASS_PATH, or model.model of a recipe"


def network(path: str, outputs: int | None = None) -> nn.Module:
    """A model as its folder's `config.json` says (transformers, timm, diffusers), without weights.

    It is what `from_pretrained` would build, its weights drawn at random; no code from the folder
    is run.

    Args:
        path: the model's folder or its file of weights, local or remote, or
            `package:NAME/FOLDER` of an installed package.
        outputs: of a classifier's head over the model, for which each task has its own. None: the
            class as it is.

    Returns:
        the model in eval mode, in the dtype that the configuration names.

    Raises:
        CheckpointError: there is no `config.json`, or its class can't be built.
        FusionKitError: the library that has the class is not installed.
    """
    config = _config(path)
    try:
        with _default_dtype(config):
            found = made(config, outputs).eval()
            return found if outputs is None else padded(found)
    except ImportError as error:
        library = (error.name or "what it needs").partition(".")[0]
        raise FusionKitError(f"{path}: needs {library}; pip install {library}") from error
    except Exception as error:  # classes raise what they like over a configuration
        raise CheckpointError(
            f"{path}: the class that its {CONFIG} names can't be built ({error}); {_MEND}"
        ) from error


def _config(path: str) -> dict[str, Any]:
    found = open_path(path)
    file = (found.parent if is_weights(found) else found) / CONFIG
    try:
        config = read_json(file)
    except OSError as error:
        raise CheckpointError(f"{path}: has no {CONFIG} that names its class; {_MEND}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); fetch it again") from error
    return config if isinstance(config, dict) else {}


@contextmanager
def _default_dtype(config: Mapping[str, Any]) -> Iterator[None]:
    """New tensors are of the dtype that a configuration names."""
    named = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    before = torch.get_default_dtype()
    torch.set_default_dtype(known.get(named, before))
    try:
        yield
    finally:
        torch.set_default_dtype(before)
