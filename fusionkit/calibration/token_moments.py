"""Which directions of an error in a linear layer a task feels, by what its tokens bring there."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusionkit.checkpoints.architecture import Architecture
from fusionkit.task_vectors.moments import Moments

_DAMPING = 1.0
"""How much a direction counts that no token has shown, over the mean of all: few rows don't show
all that others will."""
_LONGEST = 4096
"""Sides up to which moments are kept."""
_MOST = 1 << 30
"""How many numbers they are at most, of all tasks together."""


@dataclass
class _Call:
    """A layer's call: its weight's name, what each token brings, ‖x‖², and Σ ‖g‖² by now."""

    name: str
    inputs: Tensor
    sizes: Tensor
    felt: Tensor
    transposed: bool


class TokenMoments:
    """Sums over the tokens that one task's linear layers see.

    Of a layer y = W x an error E changes what the model says by gᵀ E x a token, g being the
    gradient at y. Σ (gᵀ E x)², over all tokens, is taken for ⟨G E A, E⟩ up to a factor, with
    A = Σ ‖g‖² x xᵀ and G = Σ ‖x‖² g gᵀ: K-FAC (1503.05671), where each token counts on one side by
    its size on the other. What has no gradient, as padding, counts for nothing.

    Known are the weights of `nn.Linear` and of transformers' Conv1D that share their tensor with
    no other. Sides of more than 4096 are left out, and the longest where all would be more than
    4 GiB on the CPU: nothing is known of their directions then. A batch's inputs are kept on its
    device until `flush`.

    Args:
        leaves: a tensor's name → what stands for it in the model, as its layers hold it.
        tasks: of how many tasks moments are kept.
        tied: names that are known not to be a layer's alone.
    """

    def __init__(
        self, leaves: Mapping[str, Tensor], tasks: int, tied: frozenset[str] = frozenset()
    ) -> None:
        alone = {
            name: leaf
            for name, leaf in leaves.items()
            if leaf.ndim == 2 and min(leaf.shape) > 1 and name not in tied
        }
        self._names = {id(leaf): name for name, leaf in alone.items()}
        self._sides = _within(
            {name: tuple(leaf.shape) for name, leaf in alone.items()}, _MOST // max(tasks, 1)
        )
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._calls: list[_Call] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch what layers are called with while the context lasts."""
        layers = {}
        for name, kind in Architecture.of(model).kinds.items():
            path, _, own = name.rpartition(".")
            if kind in ("linear", "transposed") and own == "weight":
                layers[model.get_submodule(path)] = kind == "transposed"
        handles = [
            layer.register_forward_hook(partial(self._called, transposed))
            for layer, transposed in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def flush(self) -> None:
        """Add up what a batch's gradients have told of its inputs, and let go of them."""
        for call in self._calls:
            self._add(call.name, 0 if call.transposed else 1, call.inputs, call.felt)
        self._calls = []

    def found(self) -> dict[str, Moments]:
        """Of the matrices that any token has reached; the sums are used up."""
        sums, self._sums = self._sums, {}
        roots = {key: _root(sums.pop(key)) for key in list(sums)}
        names = dict.fromkeys(name for name, _ in roots)
        return {name: Moments(roots.get((name, 0)), roots.get((name, 1))) for name in names}

    def _called(self, transposed: bool, layer: nn.Module, args: Any, out: Any) -> None:
        name = self._names.get(id(layer.weight))
        if name is None or not args or not out.requires_grad:
            return
        inputs = args[0].detach().reshape(-1, args[0].shape[-1])
        sizes = inputs.to(torch.float32).square().sum(1)
        call = _Call(name, inputs, sizes, torch.zeros_like(sizes), transposed)
        self._calls.append(call)
        out.register_hook(partial(self._felt, call))

    def _felt(self, call: _Call, gradient: Tensor) -> None:
        own = gradient.detach().reshape(-1, gradient.shape[-1]).to(torch.float32)
        call.felt += own.square().sum(1)
        self._add(call.name, 1 if call.transposed else 0, own, call.sizes * own.any(1))

    def _add(self, name: str, place: int, tokens: Tensor, weights: Tensor) -> None:
        """Σ w t tᵀ, of one side of a matrix."""
        if self._sides.get((name, place)) != tokens.shape[1]:
            return
        counted = weights.nonzero().squeeze(1)
        own = tokens[counted].to(torch.float32)
        product = (own.mT @ (weights[counted, None] * own)).cpu()
        key = name, place
        self._sums[key] = self._sums[key].add_(product) if key in self._sums else product


def _within(shapes: Mapping[str, tuple[int, ...]], numbers: int) -> dict[tuple[str, int], int]:
    """Sides, by name and axis, whose squares are no more than so many numbers: the shortest."""
    sides = [(side, name, axis) for name, each in shapes.items() for axis, side in enumerate(each)]
    kept = {}
    for side, name, axis in sorted(sides):
        numbers -= side * side
        if side > _LONGEST or numbers < 0:
            break
        kept[name, axis] = side
    return kept


def _root(moment: Tensor) -> Tensor | None:
    """A factor of a moment, damped, of mean eigenvalue 1; None of one that tells nothing."""
    mean = float(moment.diagonal().mean())
    if not 0 < mean < math.inf:
        return None
    moment.div_(mean * (1 + _DAMPING)).diagonal().add_(_DAMPING / (1 + _DAMPING))
    root: Tensor = torch.linalg.cholesky(moment)
    return root
