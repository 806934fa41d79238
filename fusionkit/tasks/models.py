"""Base models by config, for recipes, where `class_path` may name a function.

timm needs no help from here: `timm.create_model` and its classes are class paths as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from fusionkit.checkpoints.paths import written_out
from fusionkit.errors import CheckpointError, FusionKitError


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
    folder = written_out(path)
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
