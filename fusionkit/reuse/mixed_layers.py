"""Layers that answer each row of a batch as its task's model would, a kind of module each.

The first axis of what they are given is the rows, or a multiple of them in their order; anything
else is refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.reuse.mixed_layer import Layer, Running
from fusionkit.reuse.operands import Whole
from fusionkit.reuse.row_groups import by_group
from fusionkit.reuse.row_products import Products
from fusionkit.reuse.row_tasks import Place, RowTasks, put, taken


class LinearLayer(Layer):
    """A linear layer: the base's product once, and beside it each task's own on its own rows."""

    def __call__(self, running: Running, x: Tensor) -> Tensor:
        """`(rows · k, …, in)` → `(rows · k, …, out)`."""
        rows = running.rows_of_call()
        plan = rows.plan(self, lambda: self._plan(running, rows))
        by_row = x[None] if rows.alone else self.by_rows(x, rows)
        flat = by_row.reshape(len(by_row), -1, x.shape[-1])
        return plan(flat).view(-1, *x.shape[1:-1], plan.width)

    def _plan(self, running: Running, rows: RowTasks) -> "_LinearPlan":
        weight = self.base("weight")
        assert weight is not None
        wholes: dict[str | None, _Weight] = {}
        products: dict[str | None, tuple[Tensor, Tensor]] = {}
        for task in rows.groups:
            operand = self.operand(running, task, "weight")
            if isinstance(operand, LowRank):
                products[task] = self._product(operand)
            elif operand is not None:
                like = operand.tensor if isinstance(operand, Whole) else weight
                wholes[task] = _Weight(self._getter(running, task), self._lying(like).shape)
        biases = {task: self.tensor(running, task, "bias") for task in rows.groups}
        return _LinearPlan(rows, self._lying(weight), biases, wholes, products)

    def _getter(self, running: Running, task: str | None) -> Callable[[], Tensor]:
        """What gives a task's own weight; held for a call alone, if there is no room for it."""

        def weight() -> Tensor:
            found = self.tensor(running, task, "weight")
            assert found is not None
            return self._lying(found)

        return weight

    def _lying(self, weight: Tensor) -> Tensor:
        """A weight as `(out, in)`."""
        return weight

    def _product(self, product: LowRank) -> tuple[Tensor, Tensor]:
        """A product's factors, `(in, r)` and `(r, out)`."""
        return product.right, product.left.mT


class TransposedLayer(LinearLayer):
    """transformers' Conv1D, whose weight is `(in, out)`."""

    def _lying(self, weight: Tensor) -> Tensor:
        return weight.mT

    def _product(self, product: LowRank) -> tuple[Tensor, Tensor]:
        return product.left, product.right.mT


class _Weight(NamedTuple):
    """A task's own weight, `(out, in)`: what gives it, and its shape."""

    of: Callable[[], Tensor]
    shape: torch.Size


class _LinearPlan:
    """How one linear layer answers these rows; worked out once for all steps.

    Args:
        rows: whose rows are which.
        weight: the base's, `(out, in)`.
        biases: of each task, the base's where it has none of its own.
        wholes: the weights of the tasks that have their own.
        products: the factors of the tasks that have the base's and a product.

    Attributes:
        width: how many outputs there are; those that a task lacks have the dtype's lowest value.
    """

    def __init__(
        self,
        rows: RowTasks,
        weight: Tensor,
        biases: Mapping[str | None, Tensor | None],
        wholes: Mapping[str | None, _Weight],
        products: Mapping[str | None, tuple[Tensor, Tensor]],
    ) -> None:
        self._weight = weight
        left = [task for task in rows.groups if task not in wholes]
        alone = rows.alone
        everything = slice(0, 1 if alone else len(rows))
        self._base = rows.place(left) if left and not alone else everything if left else None
        one = next((biases[task] for task in left), None)
        same = all(biases[task] is one for task in left)
        self._bias = one if same else None
        self._biases = None if same else _by_row(rows, biases, left)
        self._wholes = [
            (everything if alone else rows.groups[task], own, biases[task])
            for task, own in wholes.items()
        ]
        self._products = Products(rows, products) if products else None
        shapes = [weight.shape] * bool(left) + [own.shape for own in wholes.values()]
        self.width, self._inputs = (max(sizes) for sizes in zip(*shapes, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        """`(rows, n, in)` → `(rows, n, out)`; each task's are as many as it has, from the first."""
        if x.shape[-1] != self._inputs:
            raise RuntimeError(f"expected {self._inputs} inputs, got shape {list(x.shape)}")
        if not self._wholes:
            out = functional.linear(x, self._weight, self._bias)
        else:
            out = x.new_full((*x.shape[:-1], self.width), torch.finfo(x.dtype).min)
            if self._base is not None:
                own = taken(x, self._base)[..., : self._weight.shape[1]]
                part = functional.linear(own, self._weight, self._bias)
                _put_columns(out, self._base, part)
            for place, weight, bias in self._wholes:
                own = taken(x, place)[..., : weight.shape[1]]
                _put_columns(out, place, functional.linear(own, weight.of(), bias))
        width = len(self._weight)
        if self._biases is not None:
            place, biases = self._biases
            out[place, :, :width] += biases
        if self._products is not None:
            self._products.add(x, out if self.width == width else out[..., :width])
        return out


def _by_row(
    rows: RowTasks, biases: Mapping[str | None, Tensor | None], tasks: Sequence[str | None]
) -> tuple[Place, Tensor]:
    """The rows of some tasks, and their biases, `(n, 1, out)`."""
    found = [biases[task] for task in rows.tasks if task in tasks]
    like = next(each for each in found if each is not None)
    each = [torch.zeros_like(like) if bias is None else bias for bias in found]
    return rows.place(tasks), torch.stack(each)[:, None]


def _put_columns(out: Tensor, place: Place, part: Tensor) -> None:
    if part.shape[-1] == out.shape[-1]:
        put(out, place, part)
    else:
        put(out[..., : part.shape[-1]], place, part)


class EmbeddingLayer(Layer):
    """An embedding: each task's own rows of the table for its own tokens."""

    def __call__(self, running: Running, tokens: Tensor) -> Tensor:
        """int64 `(rows, …)`, or `(1, …)`, every row's → `(rows, …, width)`."""
        rows = running.rows_of_call()
        if rows.alone:
            return self._looked_up(running, rows.tasks[0], tokens)
        if tokens.ndim < 2:  # of positions, perhaps, which no row has to itself
            raise self.refused(tokens, rows)
        ids = self.by_rows(tokens, rows)
        parts = {
            task: self._looked_up(running, task, taken(ids, place))
            for task, place in rows.groups.items()
        }
        first = next(iter(parts.values()))
        out = first.new_empty(*ids.shape, first.shape[-1])
        for task, place in rows.groups.items():
            put(out, place, parts[task])
        return out.flatten(0, 1)

    def _looked_up(self, running: Running, task: str | None, ids: Tensor) -> Tensor:
        table, operand = self.base("weight"), self.operand(running, task, "weight")
        assert table is not None
        if isinstance(operand, LowRank):
            product = functional.embedding(ids, operand.left) @ operand.right.mT
            return functional.embedding(ids, table).add_(product)
        return functional.embedding(ids, running.tensor(task, self.leaves[0].full, table))


class NormLayer(Layer):
    """A LayerNorm: every row's own scale and shift."""

    def __call__(self, running: Running, x: Tensor) -> Tensor:
        """`(rows · k, …, *shape)` → the same."""
        rows = running.rows_of_call()
        if rows.alone:
            task = rows.tasks[0]
            weight, bias = (self.tensor(running, task, name) for name in ("weight", "bias"))
            return functional.layer_norm(x, self._shape, weight, bias, self._eps)
        plan = rows.plan(
            self, lambda: [self._by_row(running, rows, name) for name in ("weight", "bias")]
        )
        by_row = self.by_rows(x, rows)
        out = functional.layer_norm(by_row, self._shape, eps=self._eps)
        for own, change in zip(plan, (Tensor.mul_, Tensor.add_), strict=True):
            if own is not None:
                middle = out.ndim - own.ndim
                change(out, own.view(len(rows), *[1] * middle, *own.shape[1:]))
        return out.flatten(0, 1)

    @property
    def _shape(self) -> list[int]:
        return list(self.module.normalized_shape)  # type: ignore[arg-type]

    @property
    def _eps(self) -> float:
        return float(self.module.eps)  # type: ignore[arg-type]

    def _by_row(self, running: Running, rows: RowTasks, name: str) -> Tensor | None:
        base = self.base(name)
        if base is None:
            return None
        own = {task: self.tensor(running, task, name) for task in rows.groups}
        found = [own[task] for task in rows.tasks]
        return torch.stack([each for each in found if each is not None])


class GroupLayer(Layer):
    """Any other module: run for each task by itself, on its rows, with its tensors."""

    def __call__(self, running: Running, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, the rows in their order."""
        rows = running.rows_of_call()

        def run(task: str | None, args: Any, kwargs: Any) -> Any:
            own = self.own_tensors(running, task)
            with running.within(rows.part(task)), self._having(own):
                return self._forward(*args, **kwargs)

        if rows.alone:
            return run(rows.tasks[0], args, kwargs)
        return by_group(rows, run, args, kwargs, self.path)

    def own_tensors(self, running: Running, task: str | None) -> list[Tensor]:
        """The tensors that a task has, in the order of the leaves."""
        pairs = zip(self.leaves, self._held, strict=True)
        return [_like(base, running.tensor(task, leaf.full, base)) for leaf, base in pairs]

    @contextmanager
    def _having(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        before = [leaf.now() for leaf in self.leaves]
        try:
            for leaf, tensor in zip(self.leaves, tensors, strict=True):
                leaf.put(tensor)
            yield
        finally:
            for leaf, tensor in zip(self.leaves, before, strict=True):
                leaf.put(tensor)


def _like(base: Tensor, own: Tensor) -> Tensor:
    if own is base or not isinstance(base, nn.Parameter):
        return own
    return nn.Parameter(own, requires_grad=False)
