"""What calibration looks at: a model's outputs, or what its head gets; and how far they are off."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fusionkit.errors import FusionKitError
from fusionkit.tasks.task import Task


def outputs(
    model: nn.Module, weights: Mapping[str, Tensor], batch: Any, kind: Task, head: str | None
) -> Tensor:
    """What the objective looks at: the model's outputs `(B, …)`, or what a module gets.

    Args:
        model: the model.
        weights: used in place of its own, where given; ties are kept.
        batch: one of the task's.
        kind: the task's; says how the model is called.
        head: the module whose input is wanted; None: the outputs.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return (
            functional_call(model, dict(weights), args, kwargs)
            if weights
            else model(*args, **kwargs)
        )

    if head is None:
        return kind.predict(call, batch)
    with _input_of(model.get_submodule(head)) as seen:
        kind.predict(call, batch)
    if not seen:
        raise FusionKitError(f"the model does not call its module '{head}': no features to match")
    return seen[-1]


def loss(objective: str, kind: Task, found: Tensor, target: Tensor | None, batch: Any) -> Tensor:
    """The objective, a mean over the rows: float32, no axes.

    Args:
        objective: as in `Calibration`.
        kind: the task's, whose own loss, or divergence, it is.
        found: the reused model's outputs or features.
        target: the fine-tuned model's; None where labels are the objective.
        batch: what they are of.
    """
    if target is None:
        return kind.loss(found, batch)
    if objective == "outputs":
        return kind.divergence(found, target)
    found, target = (each.to(torch.float32).flatten(1) for each in (found, target))
    return ((found - target).square().sum(1) / target.square().sum(1).clamp(min=1e-30)).mean()


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
