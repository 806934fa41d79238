"""Picks the task of requests that name none, beside an engine whose batches run."""

import copy
from collections.abc import Collection, Mapping, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.errors import RequestError
from fusionkit.reuse.routing import Picked, Router, features_of
from fusionkit.serving.inputs import Inputs
from fusionkit.serving.served_tasks import ServedTasks

_ROWS = 8
"""Rows of a request that are looked at, at most."""


class Picker:
    """A bundle's router over the base that an engine has in memory.

    Args:
        model: the base; its weights are shared.
        bundle: whose router it is.
        served: knows the base's tokenizer.
        inputs: makes rows ready; None: of a model that generates text, prompts are.

    Raises:
        BundleError: the bundle has no router.
    """

    def __init__(
        self, model: nn.Module, bundle: Bundle, served: ServedTasks, inputs: Inputs | None
    ) -> None:
        self._model, self._served, self._inputs = sharing(model), served, inputs
        self._whole = self._router = Router.load(bundle)
        self._device = next(model.parameters()).device
        self._lock = Lock()

    def pick(self, asked: Sequence[Any], tasks: Collection[str]) -> Picked:
        """The task of a request's rows; any thread may call it.

        Args:
            asked: prompts, or inputs as of `Predict`; all of one task.
            tasks: those that are served now.

        Raises:
            RequestError: a row is nothing that the model takes; or no task that is served is known.
        """
        batches = [self._batch(row) for row in asked[:_ROWS]]
        with self._lock:
            self._follow(tasks)
            found = [features_of(self._model, each) for each in batches]
            return self._router.pick_one(torch.cat(found))

    def _batch(self, asked: Any) -> Mapping[str, Tensor]:
        """A row as the base takes it."""
        base = self._served.find(None)
        if self._inputs is None:
            tokens = torch.tensor([base.tokens(asked)])
            return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        made = self._inputs.batch([self._inputs.row(base, asked)])
        return {name: value.to(self._device) for name, value in made.items()}

    def _follow(self, tasks: Collection[str]) -> None:
        """Know the tasks that are served, and no others."""
        if {*tasks} & {*self._whole.tasks} == {*self._router.tasks}:
            return
        left = self._whole.only(tasks)
        if left is None:
            raise RequestError("the router knows none of the tasks that are served; name one")
        self._router = left


def sharing(model: nn.Module) -> nn.Module:
    """A module of its own over the same weights: it can be called while the other one is."""
    shared: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
