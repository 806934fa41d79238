"""CalibrationModule: a few numbers per task, learned by the Trainer while all else stays."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.calibration.data import CalibrationData
from fusionkit.calibration.moments import felt
from fusionkit.calibration.objective import head_of, kept, loss
from fusionkit.calibration.progress import TaskProgress, Values, load_state, state_of
from fusionkit.calibration.settings import Calibration
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import DataError, FusionKitError
from fusionkit.reuse.module import ReuseModule
from fusionkit.reuse.sharded import check_strategy
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.task_source import with_added
from fusionkit.tasks import batches
from fusionkit.tasks.kinds import kinds_of
from fusionkit.tasks.reweighted import Reweighted
from fusionkit.tasks.spread import real_rows
from fusionkit.tasks.task import Task

_STEPS = (1e-3, 2.0)
"""The least and the greatest step of a number."""


class CalibrationModule(LightningModule, ABC):
    """Learns a few numbers of every task of a family, and nothing else.

    Memory beside the reused module (its model and its base): one more copy of the weights, as
    formed for the task at hand, and a tensor's gradient; whatever the number of tasks. The
    fine-tuned models' outputs are computed once, with their weights in the model's own place.

    An epoch takes each task's rows once, and ends in one step of its numbers.

    Args:
        reuse: its model, base and fine-tuned checkpoints are used.
        settings: how to calibrate.
        codec: what is calibrated.

    Attributes:
        family: whose tasks are calibrated; opened in `setup`.
        kinds: of what kind each task is, in the family's order.
        progress: how far each task is.
        scalars: what the optimiser steps, task after task: float32 `(n,)`.
        at: each task's numbers in the epoch that runs.
        losses: each task's loss in the last epoch: float64 `(T,)`.
    """

    family: Family

    def __init__(self, reuse: ReuseModule, settings: Calibration, codec: DeltaCodec) -> None:
        super().__init__()
        self.reuse, self.settings, self.codec = reuse, settings, codec
        self.kinds: list[Task] = []
        self.progress: list[TaskProgress] = []
        self.scalars: nn.Parameter | None = None
        self.losses = torch.zeros(0, dtype=torch.float64)
        self.strict_loading = False  # checkpoints hold the scalars only
        self._sums = torch.zeros(2, 0, dtype=torch.float64)
        self.at: list[Values] = []
        self._trained: frozenset[str] = frozenset()

    @abstractmethod
    def prepare(self) -> Sequence[Values]:
        """Encode what is encoded once, and say what each task's numbers are at first."""

    @abstractmethod
    def weights(self, place: int, own: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A task's weights, differentiable in its own numbers.

        Args:
            place: the task's, in the family.
            own: its numbers, float32 `(n,)`, on the module's device.
            like: the tensors to form by name, for their dtypes.
        """

    @abstractmethod
    def bundle_of(self, values: list[Values]) -> Bundle:
        """A temporary bundle of what was learned."""

    @abstractmethod
    def encode(self, values: list[Values]) -> None:
        """Make ready for an epoch in which the tasks' numbers are these."""

    @abstractmethod
    def turn(self, epoch: int, live: list[int]) -> None:
        """An epoch has ended; set the numbers that the optimiser does not step.

        Args:
            epoch: which; its losses are in `losses`.
            live: the places of the tasks that were not done when it began.
        """

    @abstractmethod
    def close(self) -> None:
        """Remove temporary files."""

    def stepping(self, epoch: int) -> bool:
        """Whether an epoch ends in a step of the optimiser."""
        return True

    def shift_and_scale(self, values: list[Values]) -> list[tuple[float | None, float | None]]:
        """DBMS's α and β of each task; None of another codec."""
        return [(None, None)] * len(values)

    @property
    def waits_from(self) -> int:
        """The epoch from which epochs without a better loss count."""
        return 0

    def setup(self, stage: str) -> None:
        """Open the family and encode; everything but the numbers is put out of gradients' reach.

        Raises:
            DataError: a task has no data, or it is not known what it is.
            FusionKitError: the model is sharded, or adapters themselves are reused.
        """
        check_strategy(self.trainer, self.reuse.model)
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        present = list(getattr(datamodule, "tasks", []))
        if lacking := [task for task in self.reuse.finetuned if task not in present]:
            raise DataError(
                f"there are no calibration data for task '{lacking[0]}'; the datamodule has "
                f"{', '.join(present) or 'none'}"
            )
        tasks, classes = list(self.reuse.finetuned), self.reuse.num_classes
        self.open(kinds_of(datamodule, tasks, classes, scored=False), datamodule)
        parameters = self.reuse.model.named_parameters()
        self._trained = frozenset(name for name, each in parameters if each.requires_grad)
        self.reuse.model.requires_grad_(False)
        self.automatic_optimization = self.settings.method == "gradient"

    def open(self, kinds: Mapping[str, Task], data: CalibrationData | None = None) -> None:
        """Open the family, encode, and start from where each task's numbers are at first.

        Args:
            kinds: of what kind each task is.
            data: tell a codec that asks what the outputs feel; None: it is not told.

        Raises:
            DataError: a gradient is not finite.
            FusionKitError: adapters themselves are reused.
        """
        self.family = self.reuse.family()
        if self.family.space is not None:
            raise FusionKitError(
                "calibration forms whole weights, adapters: modules reuses the adapters' own "
                "tensors; set adapters: merged"
            )
        self.kinds = [kinds[task] for task in self.family.tasks]
        moments = self.codec.uses_moments
        if data is not None and (self.codec.uses_sensitivities or moments):
            self.eval()
            self.reuse.to(self.device)  # where the Trainer will have it
            batches = partial(data.batches, device=self.device)
            told = felt(self.reuse, self.family, self.kinds, batches, self.settings, moments)
            # Of the same rows in every process; the first one's, to the last bit.
            told = self.trainer.strategy.broadcast(told)
            self.family.sensitivities, self.family.moments = told
        start = self.prepare()
        ends = torch.tensor([0, *(len(values) for values in start)]).cumsum(0).tolist()
        self.progress = [
            TaskProgress(values, slice(*ends[place : place + 2]))
            for place, values in enumerate(start)
        ]
        self.scalars = nn.Parameter(torch.cat([_tensor(values) for values in start]))
        self.losses = torch.zeros(len(start), dtype=torch.float64)
        self.at = self._values()

    def end(self) -> None:
        """Leave calibration: the reused model is the base again, and trained as before."""
        if self.scalars is None:
            return
        self.close()
        self.progress = []
        self.reuse.trainer = None  # which would keep all of this
        self.reuse.switch(None)
        for name, parameter in self.reuse.model.named_parameters():
            parameter.requires_grad_(name in self._trained)
        self.scalars = None

    def configure_optimizers(self) -> Any:
        """Rprop: exact gradients, few numbers; nothing, where they are searched."""
        if self.settings.method == "search":
            return None
        step = self.settings.learning_rate
        return torch.optim.Rprop([self.parameter], lr=step, step_sizes=_STEPS)

    def on_train_epoch_start(self) -> None:
        """Encode at the numbers that were reached, so that the losses are those of a bundle."""
        self.eval()  # a calibrated model is one that is used, without dropout
        count = self.trainer.num_training_batches
        if self.automatic_optimization and math.isfinite(count):
            self.trainer.accumulate_grad_batches = int(count)  # one step, on all rows
        self.at = self._values()
        self._sums = torch.zeros(2, len(self.progress), dtype=torch.float64)
        self.encode(self.at)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The tasks' mean loss, a part of it: of one batch of every task, `{task: batch}`.

        Differentiable in what is learned alone. One task's graph is gone before the next one's is
        made.
        """
        stepping = self.stepping(self.current_epoch)
        parameter = self.parameter
        total = 0 * parameter.sum()
        for place, task in enumerate(self.family.tasks):
            rows = self._real(place, batch[task], batch_idx)
            count = self.kinds[place].count(rows)
            if self.progress[place].done or not count:
                continue
            scalars = parameter[self.progress[place].place]
            leaf = scalars.detach().to(torch.float32).requires_grad_(stepping and len(scalars) > 0)
            value = self.loss_of(place, leaf, rows, batch_idx)
            gradient = torch.zeros_like(leaf)
            if leaf.requires_grad:
                (gradient,) = torch.autograd.grad(value, leaf)
            self._sums[0, place] += float(value.detach()) * count
            self._sums[1, place] += count
            # Worth the loss, and with its gradient, but without its graph.
            change = (scalars - scalars.detach()) @ gradient.nan_to_num()
            total = total + (value.detach() + change) * count
        mean = total / (self.settings.rows * len(self.progress))
        return mean if self.automatic_optimization else None

    def on_train_epoch_end(self) -> None:
        """Keep the best numbers; stop when no task has anything left to learn.

        Raises:
            DataError: a task's loss is not finite before anything was learned.
        """
        epoch = self.current_epoch
        sums = self._sum_over_devices(self._sums)
        self.losses = torch.where(sums[1] > 0, sums[0] / sums[1], self.losses)
        for task, each, first in zip(
            self.family.tasks, self.progress, self.losses.tolist(), strict=True
        ):
            if each.first_loss is None:
                each.first_loss = first
                if not math.isfinite(first):
                    raise DataError(
                        f"the calibration loss of task '{task}' is {first} before anything was "
                        "learned; look at its rows, and at the fine-tuned model's outputs on them"
                    )
        live = [place for place, each in enumerate(self.progress) if not each.done]
        for place in live:
            own, value = self.progress[place], float(self.losses[place])
            own.take(value, self.at[place], epoch)
            waited = epoch - max(own.best_epoch, self.waits_from)
            own.done = self.stepping(epoch) and (
                waited >= self.settings.patience or not math.isfinite(value)
            )
        self.turn(epoch, live)
        named = zip(self.family.tasks, self.losses.tolist(), strict=True)
        self.log_dict({f"calibration/{task}": value for task, value in named})
        self.log("calibration/loss", float(self.losses.mean()), prog_bar=True)
        if all(each.done for each in self.progress):
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the numbers and how far the calibration is; the weights are on disk already."""
        checkpoint["state_dict"] = {"scalars": checkpoint["state_dict"]["scalars"]}
        checkpoint["calibration"] = self.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            FusionKitError: it is no calibration's, or another one's.
        """
        if "calibration" not in checkpoint:
            raise FusionKitError("the checkpoint is of no calibration; give that of one")
        self.load_state(checkpoint["calibration"])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the numbers and the optimiser."""
        return {
            "tasks": list(self.family.tasks),
            "codec": repr(self.codec),
            "settings": repr(self.settings),
            **state_of(self.progress),
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
        load_state(self.progress, dict(state))

    def loss_of(self, place: int, leaf: Tensor, batch: Any, batch_idx: int) -> Tensor:
        """A task's loss on a batch, differentiable in its numbers.

        Args:
            place: the task's, in the family.
            leaf: its numbers, float32 `(n,)`.
            batch: some of its rows.
            batch_idx: which batch of the epoch it is.
        """
        task, target = self.family.tasks[place], self._target(place, batch, batch_idx)
        self.reuse.place(task, self.family)
        tensors = (seen := self.reuse.seen(self.family)).tensors
        like = {name: tensors[name] for name in self.family.names("delta") if name in tensors}
        own = with_added(self.family, task, self.weights(place, leaf, like))
        with torch.set_grad_enabled(leaf.requires_grad):
            student = Reweighted(self.reuse.model, seen.live(own))
            return loss(student, batch, self.kinds[place], target, self._head(place))

    @property
    def parameter(self) -> nn.Parameter:
        """`scalars`, once `setup` has made them."""
        assert self.scalars is not None
        return self.scalars

    def _real(self, place: int, batch: Any, batch_idx: int) -> Any:
        """A batch without the rows that are repeated so that all processes have as many."""
        own, kind = self.progress[place], self.kinds[place]
        before = 0 if batch_idx == 0 else own.rows_seen
        count = kind.count(batch)
        own.rows_seen = before + count
        loaders: Any = self.trainer.train_dataloader if self._trainer else {}
        return kind.first(batch, real_rows(loaders.get(self.family.tasks[place]), before, count))

    def _values(self) -> list[Values]:
        """Where each task is; one that is done stays at its best."""
        now = self.parameter.detach()
        return [
            each.best if each.done else tuple(now[each.place].tolist()) for each in self.progress
        ]

    def _target(self, place: int, batch: Any, batch_idx: int) -> Tensor | None:
        """What is kept of the fine-tuned model, of rows not seen before; None for labels."""
        targets = self.progress[place].targets
        known = targets.get(batch_idx)
        if known is not None and batches.same(known[0], batch):
            return known[1]
        target: Tensor | None = None
        if self.settings.objective != "labels":
            with torch.no_grad():
                self.reuse.place(self.family.tasks[place], self.family, deltas=True)
                target = kept(self.reuse.model, batch, self.kinds[place], self._head(place))
        targets[batch_idx] = batch, target
        return target

    def _head(self, place: int) -> str | None:
        if self.settings.objective != "features":
            return None
        return head_of(self.reuse.model, self.family.private[self.family.tasks[place]])

    def losses_at(self, values: list[Values]) -> tuple[list[float], list[int]]:
        """The tasks' losses at some values, over the rows that were calibrated on; and how many."""
        self.encode(values)
        sums = torch.zeros(2, len(self.progress), dtype=torch.float64)
        with torch.no_grad():
            for place, each in enumerate(self.progress):
                leaf = _tensor(values[place]).to(self.device)
                for batch_idx, (rows, _) in each.targets.items():
                    # After `Trainer.fit` the model is on the CPU again.
                    batch = move_data_to_device(rows, self.device)
                    count = self.kinds[place].count(batch)
                    sums[0, place] += count * float(self.loss_of(place, leaf, batch, batch_idx))
                    sums[1, place] += count
        sums = self._sum_over_devices(sums)
        return (sums[0] / sums[1].clamp(min=1)).tolist(), [int(count) for count in sums[1]]

    def _sum_over_devices(self, values: Tensor) -> Tensor:
        if self._trainer is None:
            return values
        summed: Tensor = self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum")
        return summed.to(values.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CalibrationModule":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scalars is not None:  # a few numbers can't be learned in half precision
            self.scalars.data = self.scalars.data.to(torch.float32)
        return self


def _tensor(values: Values) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
