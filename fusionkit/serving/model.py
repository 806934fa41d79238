"""The one model that a server has: the base, of the class that its tasks have."""

from typing import Any, Literal

import torch
from torch import nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.architecture import is_transformers
from fusionkit.errors import FusionKitError
from fusionkit.reuse.beside import tell
from fusionkit.reuse.in_place import become
from fusionkit.reuse.loaded import unfilled

Kind = Literal["generation", "classification"]
_HEADS = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")


def served_model(
    bundle: Bundle, device: torch.device | str | None, dtype: torch.dtype | str | None
) -> tuple[nn.Module, bool]:
    """The base in memory, with a head where its tasks have one.

    Returns:
        the model; and whether the base can answer by itself: it has all that the class has.

    Raises:
        BundleError: as of `fusionkit.load`; or the bundle has no tasks.
        WrongBaseError: the base at hand is another model.
    """
    task = bundle.tasks[0]
    model = unfilled(bundle, task, device, dtype)
    lacking, parameters = become(model, bundle, None), dict(model.named_parameters())
    heads = [parameters[name] for name in lacking if name in parameters]
    with torch.no_grad():
        for head in heads:
            head.zero_()
    tell(model, bundle, task)
    return model.eval(), not heads


def kind_of(model: nn.Module) -> Kind:
    """What a model is served for.

    Raises:
        FusionKitError: the engine can't serve it.
    """
    name = type(model).__name__
    if not is_transformers(model):
        return "classification"
    config: Any = model.config
    if not model.can_generate():  # type: ignore[operator]
        if not any(name.endswith(head) for head in _HEADS):
            raise FusionKitError(
                f"{name} neither generates text nor classifies rows, which is what can be served; "
                f"export a task, and serve it by its own code"
            )
        return "classification"
    if config.is_encoder_decoder:
        raise FusionKitError(
            f"{name} is an encoder-decoder, which the server can't run row by row yet; answer "
            "prompts with 'fusionkit generate'"
        )
    if kinds := sorted({each for each in _cache_kinds(config) if each not in _CACHES}):
        raise FusionKitError(
            f"{name} keeps more than keys and values of what it has read ({', '.join(kinds)}), "
            "which can't be joined with other rows'; answer prompts with 'fusionkit generate'"
        )
    return "generation"


_CACHES = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""The kinds of transformers' cache that hold nothing but keys and values of whole rows' tokens."""


def _cache_kinds(config: Any) -> list[str]:
    from transformers import DynamicCache

    return [type(layer).__name__ for layer in DynamicCache(config=config).layers]
