"""Calibration of a few scalars per task: settings, loss, and weights as DBMS's two make them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fusionkit.codecs.dbms import combine
from fusionkit.errors import FusionKitError
from fusionkit.tasks.models import predict


@dataclass(frozen=True)
class Calibration:
    """How a task's scalars are learned; how long, on what device, … is the Trainer's.

    Learned are DBMS's shift and scale, or the parts that another codec says can be (`learned`).
    An epoch takes each task's rows once and ends in one step of its scalars, or one evaluation
    of the search: every loss is the whole objective, at one point. DBMS's codes are made anew at
    the shift reached before each epoch. The best seen is what is kept.

    Args:
        objective: match the fine-tuned model's `outputs` (its class probabilities: the KL
            divergence) or `features` (what its head gets: a row's squared error over its square),
            neither of which needs labels; or the task's own loss on `labels`.
        method: `gradient`: Rprop, since the gradients have no noise; or, of DBMS, `search`:
            CMA-ES, which needs forward passes only.
        rows: calibration rows per task, of the training rows.
        seed: draws the rows, and the search.
        learning_rate: the first step, or the search's first spread; in units of DBMS's scale, of
            a shift as long as the task vector, of a tenth of a learned part.
        patience: epochs without a better loss after which a task is done.

    Raises:
        FusionKitError: a number is out of range.
    """

    objective: Literal["outputs", "features", "labels"] = "outputs"
    method: Literal["gradient", "search"] = "gradient"
    rows: int = 64
    seed: int = 0
    learning_rate: float = 0.3
    patience: int = 6

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("patience", 1), ("learning_rate", 0)):
            value = getattr(self, name)
            if value < least or (name == "learning_rate" and value == 0):
                raise FusionKitError(
                    f"expected the calibration's {name} to be "
                    f"{'above 0' if name == 'learning_rate' else 'at least 1'}, got {value}"
                )


@dataclass(frozen=True)
class Directions:
    """One task's u, D = C(τ − α u) and ∂D/∂α, by tensor; None where one is zero.

    They are decoded when asked for, and not kept.
    """

    shift: Callable[[str], Tensor | None]
    delta: Callable[[str], Tensor | None]
    moved: Callable[[str], Tensor | None]


class Formed(torch.autograd.Function):
    """One tensor of the reused model, θ₀ + α u + β D, as a function of the two scalars.

    Its derivatives are ⟨g, u + β ∂D/∂α⟩ and ⟨g, D⟩. Nothing but the result is kept for them: u and
    D are decoded again.
    """

    @staticmethod
    def forward(
        ctx: Any, scalars: Tensor, base: Tensor, name: str, of: Directions, dtype: torch.dtype
    ) -> Tensor:
        """The tensor: `dtype` `(*shape)`."""
        ctx.name, ctx.of, ctx.scale = name, of, float(scalars[1])
        delta = combine(of.shift(name), of.delta(name), float(scalars[0]), ctx.scale)
        if delta is None:
            return base.to(dtype, copy=True)
        return torch.add(base.to(torch.float32), delta).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The derivatives: float32 `(2,)`."""
        (gradient,) = (grad.to(torch.float32).reshape(-1) for grad in grads)
        along = [
            _dot(gradient, ctx.of.shift(ctx.name))
            + ctx.scale * _dot(gradient, ctx.of.moved(ctx.name)),
            _dot(gradient, ctx.of.delta(ctx.name)),
        ]
        return torch.stack(along), None, None, None, None


def formed(
    scalars: Tensor, base: Mapping[str, Tensor], like: Mapping[str, Tensor], of: Directions
) -> dict[str, Tensor]:
    """A task's weights as a differentiable function of its scalars.

    Args:
        scalars: α and β, float32 `(2,)`.
        base: the base's tensors by name.
        like: the tensors to form by name, for their dtypes.
        of: what they are formed of.
    """
    form: Any = Formed.apply
    return {name: form(scalars, base[name], name, of, old.dtype) for name, old in like.items()}


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


def _dot(gradient: Tensor, other: Tensor | None) -> Tensor:
    return gradient.new_zeros(()) if other is None else torch.dot(gradient, other.reshape(-1))
