"""What a reused model and its teacher are compared by."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fusionkit.errors import FusionKitError
from fusionkit.tasks.classification import predict


def outputs(
    model: nn.Module, weights: Mapping[str, Tensor], batch: Any, head: str | None
) -> tuple[Tensor, Tensor]:
    """What the objective looks at: logits `(B, classes)`, or what a module gets; and the labels.

    Args:
        model: the model.
        weights: used in place of its own, where given; ties are kept.
        batch: as for `predict`.
        head: the module whose input is wanted; None: the logits.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return (
            functional_call(model, dict(weights), args, kwargs)
            if weights
            else model(*args, **kwargs)
        )

    if head is None:
        return predict(call, batch)
    with _input_of(model.get_submodule(head)) as seen:
        _, labels = predict(call, batch)
    if not seen:
        raise FusionKitError(f"the model does not call its module '{head}': no features to match")
    return seen[-1], labels


def loss(objective: str, found: Tensor, target: Tensor) -> Tensor:
    """The objective, a mean over the rows: float32, no axes.

    Args:
        objective: as in `Calibration`.
        found: the reused model's logits or features.
        target: the fine-tuned model's, or the labels, int64 `(B,)`.
    """
    found = found.to(torch.float32)
    if objective == "labels":
        return nn.functional.cross_entropy(found, target)
    target = target.to(torch.float32)
    if objective == "features":
        found, target = found.flatten(1), target.flatten(1)
        return ((found - target).square().sum(1) / target.square().sum(1).clamp(min=1e-30)).mean()
    return nn.functional.kl_div(
        found.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean"
    )


def head_of(model: nn.Module, private: Mapping[str, Any] | list[str]) -> str:
    """The name of the module that the features go into: the head, or else the last linear layer.

    Raises:
        FusionKitError: there is neither.
    """
    for name, module in model.named_modules():
        if name and any(f"{name}.{own}" in private for own in module._parameters):
            return str(name)
    linear = [str(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise FusionKitError(
            f"{type(model).__name__} has no head and no linear layer whose input could be matched; "
            "calibrate on its outputs"
        )
    return linear[-1]


@contextmanager
def _input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The inputs that a module gets while the context lasts."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(cast(Tensor, args[0])))
    try:
        yield seen
    finally:
        handle.remove()
