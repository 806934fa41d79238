"""A model that is called with other weights than its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Reweighted:
    """A model, and weights in place of its own; it is called as the model is.

    Args:
        of: the model.
        weights: by its own names; differentiable, where they are; ties are kept.
    """

    of: nn.Module
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        if not self.weights:
            return self.of(*args, **kwargs)
        return functional_call(self.of, dict(self.weights), args, kwargs)

    @property
    def config(self) -> Any:
        """The model's configuration, where it has one."""
        return getattr(self.of, "config", None)
