"""What calibration looks at: a model's outputs, or what its head gets; and how far they are off."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from fusionkit.errors import FusionKitError
from fusionkit.tasks.reweighted import Reweighted
from fusionkit.tasks.task import Task


def kept(model: nn.Module, batch: Any, kind: Task, head: str | None) -> Tensor:
    """What a student is to be compared to, of a fine-tuned model.

    Args:
        model: the fine-tuned model.
        batch: one of the task's.
        kind: the task's; says how the model is called.
        head: the module whose input is wanted; None: what the kind keeps of the outputs.
    """
    if head is None:
        return kind.kept(model, batch)
    return features(Reweighted(model), batch, kind, head)


def loss(
    student: Reweighted, batch: Any, kind: Task, target: Tensor | None, head: str | None
) -> Tensor:
    """The objective, a mean over the rows: float32, no axes.

    Args:
        student: the reused model, its weights differentiable; the model itself has the teacher's
            head.
        batch: one of the task's.
        kind: the task's, whose own loss, or divergence, it is.
        target: what was `kept` of the fine-tuned model; None where labels are the objective.
        head: the module whose input is compared; None: the outputs are.
    """
    if target is None:
        return kind.loss_of(student, batch)
    if head is None:
        return kind.distance(student, batch, target, student.of)
    said = features(student, batch, kind, head)
    return distance(said, target.to(said.device))


def distance(found: Tensor, target: Tensor) -> Tensor:
    """How far features are off: a row's squared error over its square, a mean over the rows.

    Args:
        found: the reused model's, `(B, …)`.
        target: the fine-tuned model's.
    """
    found, target = (each.to(torch.float32).flatten(1) for each in (found, target))
    return ((found - target).square().sum(1) / target.square().sum(1).clamp(min=1e-30)).mean()


def drawn(
    model: Reweighted, batch: Any, kind: Task, head: str | None
) -> Callable[[Generator], Tensor]:
    """What the objective looks at, each times a normal draw, summed; see `Task.drawn`.

    Args:
        model: differentiable in its weights.
        batch: one of the task's.
        kind: the task's.
        head: the module whose input it is; None: it is the outputs.
    """
    if head is None:
        return kind.drawn(model, batch)
    said = features(model, batch, kind, head)
    return lambda generator: (said * torch.randn(said.shape, generator=generator).to(said)).sum()


def features(model: Reweighted, batch: Any, kind: Task, head: str) -> Tensor:
    """What a module gets.

    Raises:
        FusionKitError: it is not called.
    """
    with _input_of(model.of.get_submodule(head)) as seen:
        kind.predict(model, batch)
    if not seen:
        raise FusionKitError(f"the model does not call its module '{head}': no features to match")
    return seen[-1]


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
