"""Picks the task of requests that name none, beside an engine whose batches run."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.errors import RequestError
from fusionkit.reuse.routing import Picked, Router, features_of

_ROWS = 8
"""Rows of a request that are looked at, at most."""


class Picker:
    """A bundle's router over the base that an engine has in memory.

    Args:
        model: the base; its weights are shared.
        bundle: whose router it is.
        read: a row as it was asked → what the model takes, a batch of one.

    Raises:
        BundleError: the bundle has no router.
    """

    def __init__(
        self, model: nn.Module, bundle: Bundle, read: Callable[[Any], Mapping[str, Tensor]]
    ) -> None:
        self._model, self._read = sharing(model), read
        self._whole = self._router = Router.load(bundle)
        self._device = next(model.parameters()).device
        self._lock = Lock()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that it knows."""
        return self._whole.tasks

    def pick(self, rows: Sequence[Any], tasks: Collection[str]) -> Picked:
        """The task of a request's rows; any thread may call it.

        Args:
            rows: as they were asked, all of one task.
            tasks: those that are served now.

        Raises:
            RequestError: a row is nothing that the model takes; or no task that is served is known.
        """
        batches = [self._read(row) for row in rows[:_ROWS]]
        with self._lock:
            if set(tasks) & set(self._whole.tasks) != set(self._router.tasks):
                left = self._whole.only(tasks)
                if left is None:
                    raise RequestError(
                        "the router knows none of the tasks that are served; name one"
                    )
                self._router = left
            moved = [{n: value.to(self._device) for n, value in each.items()} for each in batches]
            found = torch.cat([features_of(self._model, each) for each in moved])
            return self._router.pick_one(found)


def sharing(model: nn.Module) -> nn.Module:
    """A module of its own over the same weights: it can be called while the other one is."""
    shared: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
