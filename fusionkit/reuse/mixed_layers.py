"""Layers that answer each row of a batch as its task's model would, a kind of module each.

The first axis of what they are given is the rows, or a multiple of them in their order; anything
else is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.reuse.mixed_layer import Layer, Running
from fusionkit.reuse.operands import Operand, Whole
from fusionkit.reuse.row_groups import by_group
from fusionkit.reuse.row_tasks import Place, RowTasks, put, taken
from fusionkit.reuse.thin_products import JoinedFactors, ThinProducts


class LinearLayer(Layer):
    """A linear layer: the base's product once, and beside it each task's own on its own rows."""

    products = frozenset({"weight"})

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__(module, path)
        self._factors = JoinedFactors()

    def __call__(self, running: Running, x: Tensor) -> Tensor:
        """`(rows · k, …, in)` → `(rows · k, …, out)`."""
        rows = running.rows_of_call()
        plan = rows.plans.get(self)
        if plan is None:
            plan = rows.plans[self] = self._plan(running, rows)
        assert isinstance(plan, _LinearPlan)
        by_row = x[None] if rows.alone else self.by_rows(x, rows)
        flat = by_row.reshape(len(by_row), -1, x.shape[-1])
        return plan(flat).view(-1, *x.shape[1:-1], plan.width)

    def _plan(self, running: Running, rows: RowTasks) -> "_LinearPlan":
        weight, bias = self.base("weight"), self.base("bias")
        assert weight is not None
        own = {task: self.own(running, task) for task in rows.groups}
        wholes: dict[str | None, tuple[Tensor, Tensor | None]] = {}
        products: dict[str | None, tuple[Tensor, Tensor]] = {}
        for task, each in own.items():
            operand = each.get("weight")
            if isinstance(operand, Whole):
                wholes[task] = self._lying(operand.tensor), _whole(each, "bias", bias)
            elif operand is not None:
                products[task] = self._product(operand)
        biases = {task: _whole(each, "bias", bias) for task, each in own.items()}
        thin = ThinProducts(rows, products, self._factors)
        return _LinearPlan(rows, self._lying(weight), biases, wholes, thin)

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


class _LinearPlan:
    """How one linear layer answers these rows; worked out once for all steps.

    Args:
        rows: whose rows are which.
        weight: the base's, `(out, in)`.
        biases: of each task, the base's where it has none of its own.
        wholes: the weights and biases of the tasks that have their own.
        products: of the tasks that have the base's and a product.

    Attributes:
        width: how many outputs there are; those that a task lacks have the dtype's lowest value.
    """

    def __init__(
        self,
        rows: RowTasks,
        weight: Tensor,
        biases: Mapping[str | None, Tensor | None],
        wholes: Mapping[str | None, tuple[Tensor, Tensor | None]],
        products: ThinProducts,
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
            (everything if alone else rows.groups[task], *own) for task, own in wholes.items()
        ]
        self._products = products
        widths = [len(weight)] if left else []
        self.width = max(widths + [len(own) for own, _ in wholes.values()])
        used = [weight] * bool(left) + [own for own, _ in wholes.values()]
        self._inputs = max(own.shape[1] for own in used)

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
                _put_columns(out, place, functional.linear(own, weight, bias))
        width = len(self._weight)
        if self._biases is not None:
            place, biases = self._biases
            out[place, :, :width] += biases
        self._products.add(x, out)
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

    products = frozenset({"weight"})

    def __call__(self, running: Running, tokens: Tensor) -> Tensor:
        """int64 `(rows, …)`, or `(1, …)`, every row's → `(rows, …, width)`."""
        rows = running.rows_of_call()
        table = self.base("weight")
        assert table is not None
        if rows.alone:
            return self._looked_up(tokens, table, running.operand(rows.tasks[0], self._full))
        if tokens.ndim < 2:  # of positions, perhaps, which no row has to itself
            raise self.refused(tokens, rows)
        ids = self.by_rows(tokens, rows)
        parts = {
            task: self._looked_up(taken(ids, place), table, running.operand(task, self._full))
            for task, place in rows.groups.items()
        }
        out = next(iter(parts.values())).new_empty(*ids.shape, table.shape[1])
        for task, place in rows.groups.items():
            put(out, place, parts[task])
        return out.flatten(0, 1)

    @property
    def _full(self) -> str:
        return self.leaves[0].full

    def _looked_up(self, ids: Tensor, table: Tensor, operand: Operand | None) -> Tensor:
        if isinstance(operand, Whole):
            return functional.embedding(ids, operand.tensor)
        found = functional.embedding(ids, table)
        if operand is not None:
            found = found + functional.embedding(ids, operand.left) @ operand.right.mT
        return found


class NormLayer(Layer):
    """A LayerNorm: every row's own scale and shift."""

    def __call__(self, running: Running, x: Tensor) -> Tensor:
        """`(rows · k, …, *shape)` → the same."""
        rows = running.rows_of_call()
        if rows.alone:
            own = self.own(running, rows.tasks[0])
            weight, bias = (_whole(own, name, self.base(name)) for name in ("weight", "bias"))
            return functional.layer_norm(x, self._shape, weight, bias, self._eps)
        plan = rows.plans.get(self)
        if plan is None:
            plan = rows.plans[self] = [self._by_row(running, rows, n) for n in ("weight", "bias")]
        assert isinstance(plan, list)
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
        own = {task: _whole(self.own(running, task), name, base) for task in rows.groups}
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
        found = []
        for leaf, base in zip(self.leaves, self._held, strict=True):
            operand = running.operand(task, leaf.full)
            assert not isinstance(operand, LowRank)
            found.append(base if operand is None else _like(base, operand.tensor))
        return found

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
    return nn.Parameter(own, requires_grad=False) if isinstance(base, nn.Parameter) else own


def _whole(own: Mapping[str, Operand], name: str, base: Tensor | None) -> Tensor | None:
    operand = own.get(name)
    return operand.tensor if isinstance(operand, Whole) else base
