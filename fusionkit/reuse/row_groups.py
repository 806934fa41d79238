"""A module run task by task: arguments cut into each task's rows, and what comes of it joined."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusionkit.errors import FusionKitError
from fusionkit.reuse.row_tasks import Place, RowTasks, put, taken

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


def by_group(
    rows: RowTasks,
    run: Callable[[str | None, Any, Any], Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    label: str,
) -> Any:
    """Call something once for each task, with its rows of all tensors among the arguments.

    Args:
        rows: whose rows are which.
        run: called with a task, its positional arguments and its keywords.
        args: tensors `(rows · k, …)` in the rows' order, as long as the first of them; or `(1, …)`,
            which all have; sequences and mappings of such; plain values.
        kwargs: likewise.
        label: how messages call what is run.

    Returns:
        what `run` returns, of the same form: tensors `(rows · k, …)`, or mappings and sequences of
        such. Columns that some tasks lack have the dtype's lowest value.

    Raises:
        FusionKitError: an argument, or what is returned, has no rows.
    """
    cut = _Cut(rows, label)
    found = {
        task: run(task, cut.taken(args, place), cut.taken(kwargs, place))
        for task, place in rows.groups.items()
    }
    return cut.joined(list(found.values()))


class _Cut:
    def __init__(self, rows: RowTasks, label: str) -> None:
        self._rows, self._label = rows, label
        self._length = 0

    def taken(self, value: Any, place: Place) -> Any:
        """The rows at a place of all tensors in a value."""
        if isinstance(value, Tensor):
            if value.ndim == 0 or len(value) == 1:
                return value
            times, left = divmod(len(value), len(self._rows))
            self._length = self._length or len(value)
            if left or len(value) != self._length:
                raise self._refused(f"a tensor of shape {list(value.shape)}")
            by_row = value.view(len(self._rows), times, *value.shape[1:])
            return taken(by_row, place).flatten(0, 1)
        if isinstance(value, Mapping):
            return {name: self.taken(each, place) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return _as(value, [self.taken(each, place) for each in value])
        if isinstance(value, _PLAIN):
            return value
        raise self._refused(f"a {type(value).__name__}")

    def joined(self, found: Sequence[Any]) -> Any:
        """What each task's rows gave, as one."""
        first = found[0]
        if isinstance(first, Tensor):
            return self._tensor(found)
        if isinstance(first, Mapping):
            joined = {name: self.joined([each[name] for each in found]) for name in first}
            return joined if type(first) is dict else type(first)(**joined)
        if isinstance(first, list | tuple):
            return _as(first, [self.joined(each) for each in zip(*found, strict=True)])
        if all(each is first or each == first for each in found):
            return first
        raise self._refused(f"results of {type(first).__name__} that differ")

    def _tensor(self, found: Sequence[Tensor]) -> Tensor:
        places = list(self._rows.groups.values())
        counts = [len(self._rows.part(task)) for task in self._rows.groups]
        if all(each.ndim and len(each) == 1 for each in found):  # for every row of a task's
            found = [each.expand(n, *each.shape[1:]) for each, n in zip(found, counts, strict=True)]
        times = {
            divmod(len(t), n) if t.ndim else (0, 1) for t, n in zip(found, counts, strict=True)
        }
        if len(times) > 1 or any(left for _, left in times):
            raise self._refused(f"results of shape {[list(each.shape) for each in found]}")
        [(k, _)] = times
        shape = [max(sizes) for sizes in zip(*(each.shape[1:] for each in found), strict=True)]
        first = found[0]
        out = first.new_empty(len(self._rows), k, *shape)
        if any(list(each.shape[1:]) != shape for each in found):
            out.fill_(torch.finfo(first.dtype).min)
        for place, count, part in zip(places, counts, found, strict=True):
            inner = out[(slice(None), slice(None), *(slice(n) for n in part.shape[1:]))]
            put(inner, place, part.reshape(count, k, *part.shape[1:]))
        return out.flatten(0, 1)

    def _refused(self, what: str) -> FusionKitError:
        return FusionKitError(
            f"'{self._label}' is run task by task, and has {what} in a batch of {len(self._rows)} "
            "rows, which can't be told apart by row; run the tasks one by one (ReuseModule.switch)"
        )


def _as(like: Sequence[Any], values: Sequence[Any]) -> Any:
    if isinstance(like, list):
        return list(values)
    return type(like)(*values) if hasattr(like, "_fields") else tuple(values)
