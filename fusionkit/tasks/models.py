"""Base models: by config, for recipes, where `class_path` may name a function; called, loaded.

timm needs no help from here: `timm.create_model` and its classes are class paths as they are.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.paths import resolve_package_path
from fusionkit.errors import CheckpointError, FusionKitError
from fusionkit.reuse.sharded import aliases, put
from fusionkit.task_vectors.family import matches

MetricOfClasses = Callable[[int], Metric]
"""Number of classes → a fresh metric."""


def accuracy(num_classes: int) -> Metric:
    """Share of the rows whose most likely class is right."""
    return MulticlassAccuracy(num_classes=num_classes, average="micro")


def predict(model: Callable[..., Any], batch: Any) -> tuple[Tensor, Tensor]:
    """Call a classifier on a batch.

    Args:
        model: returns logits, or an object with `logits`.
        batch: `(x, y)`, or a mapping of the model's arguments and `labels`.

    Returns:
        logits `(B, classes)` and labels int64 `(B,)`.
    """
    if isinstance(batch, Mapping):
        labels = batch["labels"]
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
    else:
        inputs, labels = batch
        output = model(inputs)
    return output if isinstance(output, Tensor) else output.logits, labels


def load_base(model: nn.Module, base: Checkpoint, private: list[str]) -> None:
    """Load a base's weights into a model, in place; what the base lacks must be private.

    A model on the meta device is checked, and not filled.

    Raises:
        FusionKitError: the base lacks a tensor of the model, or has it in another shape.
    """
    state = model.state_dict()
    tied = aliases(model)
    missing = [
        name
        for name in state
        if name not in base and tied.get(name) not in base and not matches(name, private)
    ]
    if missing:
        raise FusionKitError(
            f"{base.label} lacks '{missing[0]}' ({len(missing)} such tensors) of the model "
            f"{type(model).__name__}; its names begin like '{min(base)}': give strip_prefix or "
            "add_prefix, or declare it private"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            if name in base and not matches(name, private):
                if base.specs[name].shape != tuple(tensor.shape):
                    raise FusionKitError(
                        f"{base.label}: '{name}' has shape {list(base.specs[name].shape)}, the "
                        f"model wants {list(tensor.shape)}"
                    )
                if not tensor.is_meta:
                    put(tensor, base[name])


def sequence_classifier(path: str, num_labels: int = 2, pretrained: bool = True) -> nn.Module:
    """A Hugging Face model with a sequence classification head.

    Args:
        path: a local folder, a hub name, or `package:NAME/FOLDER` of an installed package.
        num_labels: rows of the head; a task's own head replaces it, whatever its size.
        pretrained: load the weights; otherwise the architecture alone is built.

    Returns:
        the model, in eval mode; it returns an object with `logits` `(B, num_labels)`.

    Raises:
        FusionKitError: transformers, or the package that `path` names, is not installed.
        CheckpointError: there is no such model.
    """
    try:
        from transformers import AutoConfig, AutoModelForSequenceClassification
    except ImportError as error:
        raise FusionKitError(
            "sequence_classifier needs transformers; pip install 'fusionkit[text]'"
        ) from error
    folder = resolve_package_path(path)
    model_class: Any = AutoModelForSequenceClassification
    try:
        if not pretrained:
            config = AutoConfig.from_pretrained(folder, num_labels=num_labels)
            return cast(nn.Module, model_class.from_config(config)).eval()
        with _quiet():
            model = model_class.from_pretrained(folder, num_labels=num_labels)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no Hugging Face model there; expected a folder with config.json and weights, "
            f"or a hub name ({str(error).splitlines()[0]})"
        ) from error
    return cast(nn.Module, model).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors only, and no bar: that the head is newly initialised is as it should be."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
