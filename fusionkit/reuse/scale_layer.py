"""Norms that scale by a vector: called once over a batch of many tasks, with a vector a row."""

from typing import Any

import torch
from torch import Tensor, nn

from fusionkit.reuse.mixed_layer import Layer, Running
from fusionkit.reuse.operands import Whole
from fusionkit.reuse.row_tasks import RowTasks


class ScaleLayer(Layer):
    """One of transformers' RMS norms: all that these do with their vector is element by element."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module is such a norm."""
        kind = type(module)
        own = dict(module.named_parameters())
        return (
            kind.__module__.startswith("transformers.")
            and kind.__name__.endswith("RMSNorm")
            and not issubclass(kind, nn.RMSNorm)
            and {*own} == {"weight"}
            and own["weight"].ndim == 1
        )

    def __call__(self, running: Running, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`(rows · k, …, size)` → the same."""
        rows, leaf = running.rows_of_call(), self.leaves[0]
        scales = rows.plan(self, lambda: self._scales(running, rows))
        by_row = x[None] if rows.alone else self.by_rows(x, rows)
        scale = scales.view(len(scales), *[1] * (by_row.ndim - 2), -1)
        before = leaf.now()
        try:
            leaf.put(nn.Parameter(scale, requires_grad=False))
            return self._forward(by_row, *args, **kwargs).flatten(0, 1)
        finally:
            leaf.put(before)

    def _scales(self, running: Running, rows: RowTasks) -> Tensor:
        """The vectors, `(rows, size)`; of rows of one task `(1, size)`."""
        base = self.base("weight")
        own = {task: running.operand(task, self.leaves[0].full) for task in rows.groups}
        found = {
            task: operand.tensor if isinstance(operand, Whole) else base
            for task, operand in own.items()
        }
        tasks = rows.tasks[:1] if rows.alone else rows.tasks
        return torch.stack([each for task in tasks if (each := found[task]) is not None])
