"""Products of low rank that are added to a linear layer's output, each task's to its own rows."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusionkit.reuse.row_tasks import RowTasks

_FEW = 1 << 18
"""Multiplications up to which, for each run of rows of a task, one product of all tasks' factors is
faster than a product of each task's: it does all tasks' for every row, but takes a few calls in
all."""


class JoinedFactors:
    """The factors of several tasks one beside the other: one layer's, as they were last."""

    def __init__(self) -> None:
        self._of: tuple[Tensor, ...] = ()
        self._joined: tuple[Tensor, Tensor] | None = None

    def join(self, factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Pairs of `(in, r)` and `(r, out)`, one after the other → these of all ranks together."""
        same = len(self._of) == len(factors) and all(map(_same, self._of, factors))
        if self._joined is None or not same:
            self._of = factors
            self._joined = torch.cat(factors[::2], 1), torch.cat(factors[1::2])
        return self._joined


class ThinProducts:
    """The products of a layer's tasks.

    Args:
        rows: whose rows are which.
        products: task → its factors, `(in, r)` and `(r, out)`.
        factors: the layer's, whatever its rows are.
    """

    def __init__(
        self,
        rows: RowTasks,
        products: Mapping[str | None, tuple[Tensor, Tensor]],
        factors: JoinedFactors,
    ) -> None:
        self._rows, self._products, self._factors = rows, products, factors
        runs = [(rows.tasks[0], slice(0, 1))] if rows.alone else rows.runs
        self._runs = [(run, *products[task]) for task, run in runs if task in products]
        self._cost = sum(right.numel() + left.numel() for right, left in products.values())
        self._joined: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, x: Tensor, out: Tensor) -> None:
        """Add the products to an output.

        Args:
            x: the layer's input, `(rows, n, in)`, or wider.
            out: its output, `(rows, n, out)`, or wider.
        """
        several = len(self._runs) > 1
        if several and x.shape[0] * x.shape[1] * self._cost <= _FEW * len(self._runs):
            self._add_joined(x, out)
            return
        for run, right, left in self._runs:
            thin = x[run, :, : len(right)].reshape(-1, len(right)) @ right
            _add(out[run], thin, left)

    def _add_joined(self, x: Tensor, out: Tensor) -> None:
        """All tasks' at once: what is thin has each task's columns, and a row but its own."""
        if self._joined is None:
            factors = tuple(each for pair in self._products.values() for each in pair)
            self._joined = *self._factors.join(factors), self._others(x.device)
        right, left, foreign = self._joined
        thin = (x[..., : len(right)] @ right).masked_fill_(foreign, 0)
        _add(out, thin.view(-1, right.shape[1]), left)

    def _others(self, device: torch.device) -> Tensor:
        """Which columns are other tasks', bool `(rows, 1, r)`; worked out once for all layers."""
        ranks = tuple((task, right.shape[1]) for task, (right, _) in self._products.items())
        found = self._rows.plans.get(ranks)
        if found is None:
            places = {task: place for place, (task, _) in enumerate(ranks)}
            rows = torch.tensor([places.get(task, -1) for task in self._rows.tasks])
            columns = torch.arange(len(ranks)).repeat_interleave(
                torch.tensor([n for _, n in ranks])
            )
            found = (rows[:, None, None] != columns).to(device)
            self._rows.plans[ranks] = found
        assert isinstance(found, Tensor)
        return found


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, seen alike; both are alive."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _add(out: Tensor, thin: Tensor, left: Tensor) -> None:
    width = left.shape[1]
    if out.shape[-1] == width:
        out.view(-1, width).addmm_(thin, left)
    else:
        out[..., :width] += (thin @ left).view(*out.shape[:2], width)
