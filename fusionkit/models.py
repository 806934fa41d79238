"""Base models by config, for recipes: `class_path` may name a function that returns a module.

timm needs no help from here: `timm.create_model` and its classes are class paths as they are.
"""

from typing import Any, cast

from torch import nn

from fusionkit.paths import resolve_package_path


def sequence_classifier(path: str, num_labels: int = 2, pretrained: bool = True) -> nn.Module:
    """A Hugging Face model with a sequence classification head.

    Args:
        path: a local folder, a hub name, or `package:NAME/FOLDER` of an installed package.
        num_labels: rows of the head; a task's own head replaces it, whatever its size.
        pretrained: load the weights; otherwise the architecture alone is built.

    Returns:
        the model, in eval mode; it returns an object with `logits` `(B, num_labels)`.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    folder = resolve_package_path(path)
    model_class: Any = AutoModelForSequenceClassification
    if not pretrained:
        config = AutoConfig.from_pretrained(folder, num_labels=num_labels)
        return cast(nn.Module, model_class.from_config(config)).eval()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(40)  # errors only: a head that is newly initialised is meant to be
    try:
        model = model_class.from_pretrained(folder, num_labels=num_labels)
    finally:
        logging.set_verbosity(verbosity)
    return cast(nn.Module, model).eval()
