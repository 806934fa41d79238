"""The calibration of a family, epoch by epoch, as `ReuseModule` drives it through the Trainer."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.manifest import CalibrationRecord
from fusionkit.calibration.objective import head_of, loss, outputs
from fusionkit.calibration.settings import Calibration
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import DataError, FusionKitError
from fusionkit.tasks.batches import _count, _same
from fusionkit.tasks.spread import real_rows

if TYPE_CHECKING:
    from fusionkit.reuse.module import ReuseModule

Values = tuple[float, ...]
"""What is learned of one task, as the optimiser has it."""


class Calibrator(ABC):
    """Learns a few numbers of every task of a module's family, and nothing else.

    Memory beside the module (its model and its base): one more copy of the weights, as formed for
    the task at hand, and a tensor's gradient; whatever the number of tasks. The fine-tuned
    models' outputs are computed once, with their weights in the model's own place.

    Args:
        module: its model, base, family and codec.
        settings: how to calibrate.
        start: what each task's numbers are at first.

    Attributes:
        codec: the module's.
        tasks: the tasks' names.
        scalars: what the optimiser steps, task after task: float32 `(n,)`.
        losses: each task's loss in the last epoch: float64 `(T,)`.

    Raises:
        FusionKitError: adapters themselves are reused.
    """

    def __init__(
        self, module: "ReuseModule", settings: Calibration, start: Sequence[Values]
    ) -> None:
        assert module.codec is not None
        self.module, self.settings = module, settings
        self.codec: DeltaCodec = module.codec
        self.family = module.family()
        if self.family.space is not None:
            raise FusionKitError(
                "calibration forms whole weights, adapters: modules reuses the adapters' own "
                "tensors; set adapters: merged"
            )
        self.tasks = self.family.tasks
        count = len(self.tasks)
        self.scalars = torch.nn.Parameter(torch.cat([_tensor(values) for values in start]))
        ends = torch.tensor([0, *(len(values) for values in start)]).cumsum(0).tolist()
        self._slices = [slice(*ends[place : place + 2]) for place in range(count)]
        self.losses = torch.zeros(count, dtype=torch.float64)
        self._sums = torch.zeros(2, count, dtype=torch.float64)
        self._first: list[float] = []
        self._start = list(start)
        self._best: list[tuple[float, Values, int]] = [(math.inf, each, 0) for each in start]
        self._epochs = [0] * count
        self._done = [False] * count
        self._targets: list[dict[int, tuple[Any, Tensor]]] = [{} for _ in range(count)]
        self._counts = torch.zeros(count)
        self._seen = [0] * count
        self._at = self._values()

    @abstractmethod
    def _weights(self, place: int, own: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A task's weights, differentiable in its own numbers.

        Args:
            place: the task's, among `tasks`.
            own: its numbers, float32 `(n,)`, on the module's device.
            like: the tensors to form by name, for their dtypes.
        """

    @abstractmethod
    def _bundle(self, values: list[Values]) -> Bundle:
        """A temporary bundle of what was learned."""

    @abstractmethod
    def _encode(self, values: list[Values]) -> None:
        """Make ready for an epoch in which the tasks' numbers are these."""

    @abstractmethod
    def _turn(self, epoch: int, live: list[int]) -> None:
        """An epoch has ended; set the numbers that the optimiser does not step.

        Args:
            epoch: which; its losses are in `losses`, at `_at`.
            live: the tasks that were not done when it began.
        """

    @abstractmethod
    def close(self) -> None:
        """Remove temporary files."""

    def _stepping(self, epoch: int) -> bool:
        """Whether an epoch ends in a step of the optimiser."""
        return True

    def _scalars(self, values: list[Values]) -> list[tuple[float | None, float | None]]:
        """DBMS's shift and scale of each task; None of another codec."""
        return [(None, None)] * len(values)

    @property
    def done(self) -> bool:
        """Whether no task has anything left to learn."""
        return all(self._done)

    def start_epoch(self) -> None:
        """Make ready, so that the epoch's losses are those of a bundle."""
        self._at = self._values()
        self._sums.zero_()
        self._encode(self._at)

    def step(self, batch: Any, batch_idx: int, epoch: int) -> Tensor:
        """The tasks' mean loss, a batch's part of it, differentiable in what is learned alone.

        One task's graph is gone before the next one's is made.
        """
        stepping = self._stepping(epoch)
        total = 0 * self.scalars.sum()
        for place, task in enumerate(self.tasks):
            rows = self._real(place, batch[task], batch_idx)
            count = _count(rows)
            if self._done[place] or not count:
                continue
            scalars = self.scalars[self._slices[place]]
            leaf = scalars.detach().to(torch.float32).requires_grad_(stepping and len(scalars) > 0)
            value = self._loss(place, leaf, rows, batch_idx)
            gradient = torch.zeros_like(leaf)
            if leaf.requires_grad:
                (gradient,) = torch.autograd.grad(value, leaf)
            self._sums[0, place] += float(value.detach()) * count
            self._sums[1, place] += count
            # Worth the loss, and with its gradient, but without its graph.
            change = (scalars - scalars.detach()) @ gradient.nan_to_num()
            total = total + (value.detach() + change) * count
        return total / (self.settings.rows * len(self.tasks))

    def end_epoch(self, epoch: int) -> None:
        """Take stock: keep the best, and see which tasks are done.

        Raises:
            DataError: a task's loss is not finite before anything was learned.
        """
        sums = self.module.sum_over_devices(self._sums)
        self.losses = torch.where(sums[1] > 0, sums[0] / sums[1], self.losses)
        if not self._first:
            self._first = self.losses.tolist()
            for task, first in zip(self.tasks, self._first, strict=True):
                if not math.isfinite(first):
                    raise DataError(
                        f"the calibration loss of task '{task}' is {first} before anything was "
                        "learned; look at its rows, and at the fine-tuned model's outputs on them"
                    )
        live = [place for place, done in enumerate(self._done) if not done]
        for place in live:
            value = float(self.losses[place])
            self._epochs[place] = epoch + 1
            if value < self._best[place][0]:
                self._best[place] = value, self._at[place], epoch
            waited = epoch - max(self._best[place][2], self._waits_from)
            self._done[place] = self._stepping(epoch) and (
                waited >= self.settings.patience or not math.isfinite(value)
            )
        self._turn(epoch, live)

    @property
    def _waits_from(self) -> int:
        """The epoch from which epochs without a better loss count."""
        return 0

    def finish(self, out: str | Path | None, overwrite: bool = False) -> Bundle:
        """Make the bundle of the best, and record in its manifest what calibration did.

        Args:
            out: the bundle's folder; by default a temporary one.
            overwrite: replace the folder if it is there.
        """
        best = [values for _, values, _ in self._best]
        after = self._losses_at(best)
        # A codec that encodes all tasks together is not the same again once the others moved on.
        worse = [place for place, value in enumerate(after) if not value <= self._first[place]]
        if worse:
            best = [self._start[p] if p in worse else each for p, each in enumerate(best)]
            after = self._losses_at(best)
        bundle = self._bundle(best)
        records = {
            task: replace(
                bundle.manifest.tasks[task],
                calibration=CalibrationRecord(
                    *scalars,
                    objective=self.settings.objective,
                    method=self.settings.method,
                    rows=int(self._counts[place]),
                    seed=self.settings.seed,
                    epochs=self._epochs[place],
                    loss_before=self._first[place],
                    loss_after=after[place],
                ),
            )
            for place, (task, scalars) in enumerate(
                zip(self.tasks, self._scalars(best), strict=True)
            )
        }
        bundle.update(replace(bundle.manifest, tasks=records))
        if out is None:
            return bundle
        bundle.save(out, overwrite)
        return Bundle(out, self.family.base)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the scalars and the optimiser."""
        return {
            "tasks": list(self.tasks),
            "codec": repr(self.codec),
            "settings": repr(self.settings),
            "first": self._first,
            "best": self._best,
            "epochs": self._epochs,
            "done": self._done,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            FusionKitError: it is of another calibration.
        """
        for key, value in self.state().items():
            if key in ("tasks", "codec", "settings") and state.get(key) != value:
                raise FusionKitError(
                    f"the checkpoint is of another calibration, of {key} {state.get(key)}, where "
                    f"this one has {value}; give the settings that it began with"
                )
        self._first, self._epochs, self._done = state["first"], state["epochs"], state["done"]
        self._best = [(value, tuple(best), epoch) for value, best, epoch in state["best"]]

    def _real(self, place: int, batch: Any, batch_idx: int) -> Any:
        """A batch without the rows that are repeated so that all processes have as many."""
        first = 0 if batch_idx == 0 else self._seen[place]
        count = _count(batch)
        self._seen[place] = first + count
        loaders: Any = self.module.trainer.train_dataloader if self.module._trainer else {}
        real = real_rows(loaders.get(self.tasks[place]), first, count)
        if real == count:
            return batch
        if isinstance(batch, Mapping):
            return {n: v[:real] if isinstance(v, Tensor) else v for n, v in batch.items()}
        return [v[:real] if isinstance(v, Tensor) else v for v in batch]

    def _values(self) -> list[Values]:
        """Where each task is; one that is done stays at its best."""
        return [
            best if done else tuple(self.scalars.detach()[own].tolist())
            for own, (_, best, _), done in zip(self._slices, self._best, self._done, strict=True)
        ]

    def _loss(self, place: int, leaf: Tensor, batch: Any, batch_idx: int) -> Tensor:
        module = self.module
        target = self._target(place, batch, batch_idx)
        module.place(self.tasks[place], self.family)
        state = dict(module.model.state_dict())
        like = {name: state[name] for name in self.family.names("delta")}
        weights = self._weights(place, leaf, like)
        with torch.set_grad_enabled(leaf.requires_grad):
            found, _ = outputs(module.model, weights, batch, self._head(place))
            return loss(self.settings.objective, found, target.to(found.device))

    def _target(self, place: int, batch: Any, batch_idx: int) -> Tensor:
        """The fine-tuned model's outputs, of rows that were not seen before; or the labels."""
        known = self._targets[place].get(batch_idx)
        if known is not None and _same(known[0], batch):
            return known[1]
        module = self.module
        target: Tensor
        with torch.no_grad():
            if self.settings.objective == "labels":
                target = batch["labels"] if isinstance(batch, Mapping) else batch[1]
            else:
                module.place(self.tasks[place], self.family, deltas=True)
                target, _ = outputs(module.model, {}, batch, self._head(place))
        self._targets[place][batch_idx] = batch, target
        return target

    def _head(self, place: int) -> str | None:
        if self.settings.objective != "features":
            return None
        return head_of(self.module.model, self.family.private[self.tasks[place]])

    def _losses_at(self, values: list[Values]) -> list[float]:
        """The tasks' losses at some values, over the rows that were calibrated on."""
        self._encode(values)
        sums = torch.zeros(2, len(self.tasks), dtype=torch.float64)
        with torch.no_grad():
            for place, targets in enumerate(self._targets):
                leaf = _tensor(values[place]).to(self.module.device)
                for batch_idx, (batch, _) in targets.items():
                    count = _count(batch)
                    sums[0, place] += count * float(self._loss(place, leaf, batch, batch_idx))
                    sums[1, place] += count
        sums = self.module.sum_over_devices(sums)
        self._counts = sums[1]
        return (sums[0] / sums[1].clamp(min=1)).tolist()


def _tensor(values: Values) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
