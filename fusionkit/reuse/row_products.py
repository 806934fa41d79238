"""Each task's thin products on its own rows: one run of rows after another, or all at once."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusionkit.reuse.row_tasks import RowTasks

Factors = tuple[Tensor, Tensor]
"""Of one task: `(in, r)` and `(r, out)`."""

_FEW = 8
"""Up to so many inputs a row (tokens, in generation one) all tasks' products at once are faster."""


class _Stacked(NamedTuple):
    """All tasks' factors side by side, `(T, in, r)` and `(T, r, out)`, and the rows of each.

    Attributes:
        right: with zeros up to the largest rank.
        left: likewise.
        gathered: int64 `(T · n)`, the rows by task, each task's filled up to the most that one has.
        real: int64, which of these are not filling; None: all are real.
        rows: int64, the rows of those.
    """

    right: Tensor
    left: Tensor
    gathered: Tensor
    real: Tensor | None
    rows: Tensor


class Products:
    """What some tasks' low-rank deltas add to a linear layer's outputs.

    Args:
        rows: whose rows are which.
        factors: of the tasks that have such a delta.
    """

    def __init__(self, rows: RowTasks, factors: Mapping[str | None, Factors]) -> None:
        self._rows, self._factors = rows, factors
        self._stacked: _Stacked | None = None

    def add(self, x: Tensor, out: Tensor) -> None:
        """Add them in place.

        Args:
            x: `(rows, n, in)`, or more inputs, of which the first are meant; of one task alone
                `(1, n, in)`.
            out: `(rows, n, out)`.
        """
        width = len(next(iter(self._factors.values()))[0])
        x = x[..., :width]
        if self._rows.alone:
            [(right, left)] = self._factors.values()
            _add(x, out, right, left)
        elif len(self._rows.runs) > 1 and (x.shape[1] <= _FEW or x.device.type != "cpu"):
            self._all_at_once(x, out)
        else:
            for task, run in self._rows.runs:
                if task in self._factors:
                    _add(x[run], out[run], *self._factors[task])

    def _all_at_once(self, x: Tensor, out: Tensor) -> None:
        found = self._stacked or self._stack(x.device)
        self._stacked = found
        tasks, n = len(found.right), x.shape[1]
        own = x.index_select(0, found.gathered).view(tasks, -1, x.shape[-1])
        added = torch.bmm(torch.bmm(own, found.right), found.left).view(-1, n, out.shape[-1])
        if found.real is not None:
            added = added.index_select(0, found.real)
        out.index_add_(0, found.rows, added)

    def _stack(self, device: torch.device) -> _Stacked:
        rank = max(right.shape[1] for right, _ in self._factors.values())
        shape = len(self._factors), rank
        first = next(iter(self._factors.values()))
        right = first[0].new_zeros(shape[0], len(first[0]), rank)
        left = first[1].new_zeros(*shape, first[1].shape[1])
        own: dict[str | None, list[int]] = {task: [] for task in self._factors}
        for row, task in enumerate(self._rows.tasks):
            if task in own:
                own[task].append(row)
        most = max(map(len, own.values()))
        gathered: list[int] = []
        real: list[int] = []
        for place, (task, (a, b)) in enumerate(self._factors.items()):
            right[place, :, : a.shape[1]], left[place, : len(b)] = a, b
            real += range(place * most, place * most + len(own[task]))
            gathered += own[task] + own[task][:1] * (most - len(own[task]))
        rows = [row for each in own.values() for row in each]
        indices = [torch.tensor(each, device=device) for each in (gathered, real, rows)]
        filled = len(real) < len(gathered)
        return _Stacked(right, left, indices[0], indices[1] if filled else None, indices[2])


def _add(x: Tensor, out: Tensor, right: Tensor, left: Tensor) -> None:
    thin = x.reshape(-1, len(right)) @ right
    if out.is_contiguous():
        out.view(-1, left.shape[1]).addmm_(thin, left)
    else:
        out += (thin @ left).view(out.shape)
