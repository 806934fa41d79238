"""The calibration of a family, epoch by epoch, as `ReuseModule` drives it through the Trainer."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusionkit.bundle import Bundle
from fusionkit.calibration import (
    Calibration,
    Directions,
    formed,
    head_of,
    loss,
    outputs,
)
from fusionkit.codecs.dbms import DBMS, PLAIN, Scalars, shifted
from fusionkit.errors import DataError, FusionKitError
from fusionkit.manifest import CalibrationRecord
from fusionkit.payload import Payload
from fusionkit.search import PROBES, PairSearch

if TYPE_CHECKING:
    from fusionkit.module import ReuseModule

_LEAST_MOVE = 1e-2
"""Shifts that differ by less, in units of the task vector's length, say nothing of ∂D/∂α."""
_KEPT = 3
"""Encodings of which the newest that differs enough gives ∂D/∂α, as a secant."""


class Calibrator:
    """Learns DBMS's two scalars of every task of a module's family.

    Memory beside the module (its model and its base): one more copy of the weights, as formed for
    the task at hand, and a tensor's gradient; whatever the number of tasks. The fine-tuned
    models' outputs are computed once, with their weights in the model's own place.

    Args:
        module: its model, base, family, and a `DBMS` as codec.
        settings: how to calibrate.

    Attributes:
        tasks: the tasks' names.
        scalars: α, in units of ‖τ_t‖ / ‖u_t‖, and β: float32 `(T, 2)`; what the optimiser steps.
        losses: each task's loss in the last epoch: float64 `(T,)`.

    Raises:
        FusionKitError: the codec is no DBMS, or adapters themselves are reused.
    """

    def __init__(self, module: "ReuseModule", settings: Calibration) -> None:
        if not isinstance(module.codec, DBMS):
            raise FusionKitError(
                f"only DBMS has scalars to calibrate, the codec is {module.codec!r}; wrap it: "
                "codec: {class_path: DBMS, init_args: {codec: …}}"
            )
        self.module, self.settings, self.codec = module, settings, module.codec
        self.family = module.family()
        if self.family.space is not None:
            raise FusionKitError(
                "calibration forms whole weights, adapters: modules reuses the adapters' own "
                "tensors; set adapters: merged"
            )
        self.tasks = self.family.tasks
        count = len(self.tasks)
        self.scalars = torch.nn.Parameter(torch.tensor([PLAIN] * count, dtype=torch.float32))
        self.losses = torch.zeros(count, dtype=torch.float64)
        self._sums = torch.zeros(2, count, dtype=torch.float64)
        self._first: list[float] = []
        self._best: list[tuple[float, Scalars, int]] = [(math.inf, PLAIN, 0)] * count
        self._epochs = [0] * count
        self._done = [False] * count
        self._targets: list[dict[int, tuple[Any, Tensor]]] = [{} for _ in range(count)]
        self._searches = [
            PairSearch(settings.seed + place, settings.learning_rate) for place in range(count)
        ]
        self._counts = torch.zeros(count)
        self._at = self._pairs()
        self._shift = Payload(self.codec.direction, self.family)
        self._deltas: list[Payload] = []
        self._past: list[list[Scalars]] = []
        self._shifts: list[list[float]] = []
        self._units = self._lengths()

    def close(self) -> None:
        """Remove the temporary files."""
        self._shift.close()
        for payload in self._deltas:
            payload.close()

    @property
    def done(self) -> bool:
        """Whether no task has anything left to learn."""
        return all(self._done)

    def start_epoch(self) -> None:
        """Encode at the shifts reached, so that the epoch's losses are those of a bundle."""
        self._at = self._pairs()
        self._sums.zero_()
        self._encode(self._at)

    def step(self, batch: Any, batch_idx: int, epoch: int) -> Tensor:
        """The tasks' mean loss, a batch's part of it, differentiable in the scalars alone.

        One task's graph is gone before the next one's is made.
        """
        stepping = self._stepping(epoch)
        total = self.scalars.new_zeros(())
        for place, task in enumerate(self.tasks):
            if self._done[place]:
                continue
            scalars = self.scalars[place]
            leaf = scalars.detach().to(torch.float32).requires_grad_(stepping)
            value = self._loss(place, leaf, batch[task], batch_idx)
            gradient = torch.zeros_like(leaf)
            if stepping:
                (gradient,) = torch.autograd.grad(value, leaf)
            count = _count(batch[task])
            self._sums[0, place] += float(value.detach()) * count
            self._sums[1, place] += count
            # Worth the loss, and with its gradient, but without its graph.
            change = (scalars - scalars.detach()) @ gradient.nan_to_num()
            total = total + (value.detach() + change) * count
        return total / (self.settings.rows * len(self.tasks))

    def end_epoch(self, epoch: int) -> None:
        """Take stock: keep the best scalars, and see which tasks are done.

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
        probing = epoch + 1 < len(PROBES)
        for place, (value, pair) in enumerate(zip(self.losses.tolist(), self._at, strict=True)):
            if self._done[place]:
                continue
            self._epochs[place] = epoch + 1
            self._searches[place].tell(pair, value)
            if value < self._best[place][0]:
                self._best[place] = value, pair, epoch
            waited = epoch - max(self._best[place][2], len(PROBES))
            self._done[place] = self._stepping(epoch) and (
                waited >= self.settings.patience or not math.isfinite(value)
            )
        with torch.no_grad():
            for place, search in enumerate(self._searches):
                if probing or self.settings.method == "search":
                    self.scalars[place] = _pair(search.ask())
                elif epoch + 1 == len(PROBES):
                    self.scalars[place] = _pair(search.best)

    def _stepping(self, epoch: int) -> bool:
        """Whether an epoch ends in a step of the optimiser, rather than trying a pair."""
        return self.settings.method == "gradient" and epoch >= len(PROBES)

    def finish(self, out: str | Path | None, overwrite: bool = False) -> Bundle:
        """Encode at the best scalars, and record in the manifest what calibration did.

        Args:
            out: the bundle's folder; by default a temporary one.
            overwrite: replace the folder if it is there.
        """
        pairs = [pair for _, pair, _ in self._best]
        after = self._losses_at(pairs)
        # A codec that encodes all tasks together is not the same again once the others moved on.
        worse = [place for place, value in enumerate(after) if not value <= self._first[place]]
        if worse:
            pairs = [PLAIN if place in worse else pair for place, pair in enumerate(pairs)]
            after = self._losses_at(pairs)
        scalars = dict(zip(self.tasks, self._scalars(pairs), strict=True))
        bundle = self.module.compress(codec=self.codec.at(scalars))
        records = {
            task: replace(
                bundle.manifest.tasks[task],
                calibration=CalibrationRecord(
                    *scalars[task],
                    objective=self.settings.objective,
                    method=self.settings.method,
                    rows=int(self._counts[place]),
                    seed=self.settings.seed,
                    epochs=self._epochs[place],
                    loss_before=self._first[place],
                    loss_after=after[place],
                ),
            )
            for place, task in enumerate(self.tasks)
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
            "past": self._past,
            "searches": [search.told for search in self._searches],
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
        self._best = [(value, tuple(pair), epoch) for value, pair, epoch in state["best"]]
        for search, told in zip(self._searches, state["searches"], strict=True):
            search.replay([(tuple(pair), value) for pair, value in told])
        for pairs in state["past"]:
            self._encode([tuple(pair) for pair in pairs])

    def _pairs(self) -> list[Scalars]:
        """Where each task is; one that is done stays at its best."""
        return [
            best if done else (float(pair[0]), float(pair[1]))
            for pair, (_, best, _), done in zip(
                self.scalars.detach(), self._best, self._done, strict=True
            )
        ]

    def _scalars(self, pairs: list[Scalars]) -> list[Scalars]:
        """α and β themselves."""
        units = self._units.tolist()
        return [(shift * unit, scale) for (shift, scale), unit in zip(pairs, units, strict=True)]

    def _lengths(self) -> Tensor:
        """‖τ_t‖ / ‖u_t‖: float32 `(T,)`; 1 where there is no direction."""
        squares = torch.zeros(2, len(self.tasks), dtype=torch.float64)
        for vectors in self.family:
            for place in range(len(self.tasks)):
                squares[0, place] += vectors[place].square().sum(dtype=torch.float64)
                u = self._shift.delta(place, vectors.name, vectors.shape)
                if u is not None:
                    squares[1, place] += u.square().sum(dtype=torch.float64)
        usable = (squares > 0).all(0)
        return torch.where(usable, (squares[0] / squares[1]).sqrt(), 1.0).to(torch.float32)

    def _encode(self, pairs: list[Scalars]) -> None:
        """Encode the residuals; the codes before are kept for ∂D/∂α."""
        scalars = self._scalars(pairs)
        payload = Payload(self.codec.codec, shifted(self.family, self._shift, scalars))
        for old in self._deltas[: 1 - _KEPT]:
            old.close()
        self._deltas = [*self._deltas[1 - _KEPT :], payload]
        self._shifts = [*self._shifts[1 - _KEPT :], [shift for shift, _ in scalars]]
        self._past = [*self._past[1 - _KEPT :], pairs]

    def _directions(self, place: int, device: torch.device) -> Directions:
        def read(payload: Payload, name: str) -> Tensor | None:
            shape = torch.Size(self.family.base.specs[name].shape)
            return payload.delta(place, name, shape, device)

        *past, now = (shifts[place] for shifts in self._shifts)
        least = _LEAST_MOVE * float(self._units[place])
        far = [each for each, shift in enumerate(past) if abs(now - shift) >= least]

        def moved(name: str) -> Tensor | None:
            if not far:
                return None
            old, new = (read(self._deltas[each], name) for each in (far[-1], -1))
            if new is None:
                found = None if old is None else -old
            else:
                found = new if old is None else new - old
            return None if found is None else found / (now - past[far[-1]])

        return Directions(partial(read, self._shift), partial(read, self._deltas[-1]), moved)

    def _loss(self, place: int, leaf: Tensor, batch: Any, batch_idx: int) -> Tensor:
        module = self.module
        target = self._target(place, batch, batch_idx)
        module.place(self.tasks[place], self.family)
        unit = torch.stack([self._units[place].to(leaf.device), leaf.new_ones(())])
        state = dict(module.model.state_dict())
        like = {name: state[name] for name in self.family.names("delta")}
        weights = formed(
            leaf * unit, module.base_weights, like, self._directions(place, leaf.device)
        )
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

    def _losses_at(self, pairs: list[Scalars]) -> list[float]:
        """The tasks' losses at some scalars, over the rows that were calibrated on."""
        self._encode(pairs)
        sums = torch.zeros(2, len(self.tasks), dtype=torch.float64)
        with torch.no_grad():
            for place, targets in enumerate(self._targets):
                leaf = _pair(pairs[place]).to(self.module.device)
                for batch_idx, (batch, _) in targets.items():
                    count = _count(batch)
                    sums[0, place] += count * float(self._loss(place, leaf, batch, batch_idx))
                    sums[1, place] += count
        sums = self.module.sum_over_devices(sums)
        self._counts = sums[1]
        return (sums[0] / sums[1].clamp(min=1)).tolist()


def _pair(pair: Scalars) -> Tensor:
    return torch.tensor(pair, dtype=torch.float32)


def _tensors(batch: Any) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch
    return [value for value in values if isinstance(value, Tensor)]


def _count(batch: Any) -> int:
    return len(_tensors(batch)[0])


def _same(one: Any, other: Any) -> bool:
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return all(a.shape == b.shape and torch.equal(a.to(b.device), b) for a, b in pairs)
