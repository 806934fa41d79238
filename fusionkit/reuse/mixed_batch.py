"""Batches of many tasks: a task per row, over one base model in memory."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.errors import BundleError, FusionKitError, lacks
from fusionkit.reuse.held_operands import Figures, HeldOperands
from fusionkit.reuse.layout import Layout
from fusionkit.reuse.mixed_layer import Layer
from fusionkit.reuse.operands import Operand, TaskOperands, Whole, formed, read
from fusionkit.reuse.row_tasks import RowTasks
from fusionkit.reuse.sole_switch import sole_switch
from fusionkit.task_vectors.task_source import TaskSource

OPERAND_BYTES = 2 << 30
"""Bytes of operands that are kept beside the base, unless another number is given."""


class MixedBatch:
    """One base model in memory whose batches have a task per row.

    Within `rows`, the model computes the base's products once for all rows; each task's own part
    is added to its own rows, in the form in which its codec has it. What the tasks need beside the
    base are their *operands*: read when a task is first needed, kept while there is room.

        batch = MixedBatch(model, bundle)
        with batch.rows(["dogs", "cats", "dogs", None]):
            logits = model(images)

    Args:
        model: the base model, with the base's weights; in evaluation mode. It may be called, and
            moved, between two batches.
        source: the bundle.
        operand_bytes: of operands that are kept for later batches; those used last stay. What a
            batch needs is there while it runs, however much that is.

    Raises:
        FusionKitError: the model is sharded, compiled or on the meta device, or the rows are not
            the first axis within.
        BundleError: tasks change tensors that have no place in the model.
        WrongBaseError: the model's weights are not the base's.
    """

    def __init__(
        self, model: nn.Module, source: Bundle, operand_bytes: int = OPERAND_BYTES
    ) -> None:
        self.model, self.source = model, source
        self._held = HeldOperands(operand_bytes)
        self._reading = threading.RLock()  # one thread at a time reads the bundle
        self._running = threading.Lock()
        self._owner: int | None = None
        self.rows_now = self._last = RowTasks([None])
        self._batch: dict[str, TaskOperands] = {}
        self._last_batch: dict[str, TaskOperands] = {}
        self._layers: list[Layer] = []  # that the tasks of the last batch change
        self._layout = Layout(model, source)
        self._layout.check_base()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has read nothing yet."""
        return type(self), (self.model, self.source, self._held.limit)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.source.tasks

    @property
    def figures(self) -> Figures:
        """What is held, and how often it was there."""
        return self._held.figures

    def ready(self, task: str | None) -> None:
        """Have a task's operands at hand: read, and decoded, if they are not.

        Any thread may call it, while others' batches run.

        Raises:
            BundleError: the bundle has no such task, a file of it was changed, or a value is too
                large for the model's dtype.
        """
        self._check_known([task])
        if task is not None:
            self._operands(task)

    def holds(self, task: str | None) -> bool:
        """Whether a task's operands are at hand, so that `ready` need not read them.

        Raises:
            BundleError: the bundle has no such task.
        """
        self._check_known([task])
        return task is None or self._held.peek(task, self._record(task)) is not None

    def forget(self, task: str) -> None:
        """Let go of a task's operands; a batch that runs keeps them to its end."""
        self._held.forget(lambda each: each == task)

    def classes(self, task: str | None) -> int | None:
        """How many columns of the model's output are a task's own; the others are padding.

        Args:
            task: one of `tasks`, or None, the base.

        Returns:
            rows of the model's last matrix, where it is the tasks' own (a head, or a vocabulary
            that grew); None where it is not: all columns are every row's.

        Raises:
            BundleError: the bundle has no such task.
        """
        self._check_known([task])
        return self._layout.classes(task)

    @contextmanager
    def rows(self, tasks: Sequence[str | None]) -> Iterator[None]:
        """A context in which every call of the model answers row r as `tasks[r]`.

        The model is called as it is, as often as need be: step by step, to generate. Its inputs'
        first axis is the rows. Gradients are off. Outside of it the model is the base.

        Args:
            tasks: of each row; None is the base. Those that are not ready are readied first.

        Raises:
            BundleError: the bundle has no such task, or a file of it was changed.
            FusionKitError: there are no rows, or another batch runs, or a switch.
            WrongBaseError: the model's weights are no longer the base's.
        """
        tasks = tuple(tasks)
        if not tasks:
            raise FusionKitError("a batch has no rows; give a task, or None, for each row")
        self._check_known(tasks)
        # Where no batch runs, a thread that readies a task may look at the model for a moment.
        if not self._running.acquire(blocking=self._owner is None):
            raise FusionKitError(
                "another batch runs on this model; run one at a time, or have a model for each"
            )
        try:
            with sole_switch(self.model), torch.no_grad():
                self._begin(tasks)
                with self._standing_in():
                    yield
        finally:
            self._owner, self._batch = None, {}
            self._held.use(())
            self._running.release()

    def __call__(self, tasks: Sequence[str | None], *args: Any, **kwargs: Any) -> Any:
        """What the model returns of one batch.

        Args:
            tasks: of each row; None is the base.
            args: the model's; or a batch as a dataloader gives it: a mapping of the model's
                keywords and `labels`, or a sequence whose first entry is the inputs.
            kwargs: the model's.

        Raises:
            BundleError: as `rows`; likewise FusionKitError and WrongBaseError.
        """
        with self.rows(tasks):
            if len(args) == 1 and isinstance(args[0], Mapping):
                named = {name: value for name, value in args[0].items() if name != "labels"}
                return self.model(**named, **kwargs)
            if len(args) == 1 and isinstance(args[0], list | tuple):
                return self.model(args[0][0], **kwargs)
            return self.model(*args, **kwargs)

    def operand(self, task: str | None, name: str) -> Operand | None:
        """What a task of the running batch has of one of the model's tensors; None: the base's."""
        return None if task is None else self._batch[task].operands.get(name)

    def tensor(self, task: str | None, name: str, base: Tensor) -> Tensor:
        """A task's tensor itself, formed of the base's if need be, and kept while there is room."""
        operand = self.operand(task, name)
        if task is None or operand is None:
            return base
        if isinstance(operand, Whole):
            return operand.tensor
        own = self._batch[task].formed.get(name)
        if own is None:
            own = formed(base, operand, f"{self.source.label}: task '{task}': tensor '{name}'")
            self._held.keep_formed(task, name, own)
        return own

    def rows_of_call(self) -> RowTasks:
        """Whose rows are which in the call that runs.

        Raises:
            FusionKitError: another thread calls than the batch's own.
        """
        if threading.get_ident() != self._owner:
            raise FusionKitError(
                "the model is called by another thread than the one whose batch runs; call it "
                "where `rows` was entered, or have a model for each thread"
            )
        return self.rows_now

    @contextmanager
    def within(self, rows: RowTasks) -> Iterator[None]:
        """A context in which the running batch is some of its rows."""
        before, self.rows_now = self.rows_now, rows
        try:
            yield
        finally:
            self.rows_now = before

    def _begin(self, tasks: tuple[str | None, ...]) -> None:
        self._follow()
        names = [task for task in dict.fromkeys(tasks) if task is not None]
        self._owner = threading.get_ident()
        self._held.use(names)
        batch = {task: self._operands(task) for task in names}
        known = self._last_batch
        if self._last.tasks != tasks or any(batch[name] is not known.get(name) for name in batch):
            self._last = RowTasks(tasks)
            changed = dict.fromkeys(n for each in batch.values() for n in each.operands)
            self._layers = list(dict.fromkeys(self._layout.layer(name) for name in changed))
        self.rows_now, self._batch, self._last_batch = self._last, batch, batch

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        """A context in which layers stand in for the modules that any task of the batch changes."""
        entered: list[Layer] = []
        try:
            for layer in self._layers:
                entered.append(layer)
                layer.enter(self)
            yield
        finally:
            for layer in reversed(entered):
                layer.leave()

    def _follow(self) -> None:
        """Follow the model, which may have been moved, cast or switched since the last batch.

        Raises:
            WrongBaseError: the model's weights are no longer the base's.
        """
        if not self._layout.is_current():
            self._lay_out()

    def _lay_out(self) -> None:
        with self._reading:
            before, self._layout = self._layout, Layout(self.model, self.source)
            self._layout.check_base()
            self._last, self._layers = RowTasks([None]), []  # plans are of the layout before
            if self._layout.form != before.form:
                self._held.forget(lambda task: True)

    def _operands(self, task: str) -> TaskOperands:
        """A task's operands: held, or read now."""
        record = self._record(task)
        held = self._held.get(task, record)
        if held is not None:
            return held
        if not self._layout.knows(task):  # a task came that has tensors of its own which none had
            if self._owner == threading.get_ident():
                self._lay_out()
            else:
                with self._running:
                    self._lay_out()
        with self._reading, torch.inference_mode(False), torch.no_grad():
            held = self._held.peek(task, record)  # another thread may have been faster
            if held is None:
                layout = self._layout
                found = read(self.source, task, layout.target, self._alike)
                places = {place: o for name, o in found.items() for place in layout.names(name)}
                held = TaskOperands(places, record)
                self._held.put(task, held)
        return held

    def _alike(self, name: str, tensor: Tensor) -> Tensor:
        return self._held.alike(self._layout.names(name)[0], tensor)

    def _record(self, task: str) -> object:
        """What the bundle says of a task's files: another, and the task was replaced."""
        manifest = self.source.manifest
        return manifest.tasks[task], manifest.shared

    def _check_known(self, tasks: Sequence[str | None]) -> None:
        known = self.source.manifest.tasks
        for task in tasks:
            if task is not None and task not in known:
                raise BundleError(lacks(f"{self.source.path}:", task, self.source.tasks))


def of_module(model: nn.Module, source: TaskSource, before: MixedBatch | None) -> MixedBatch:
    """What runs batches of many tasks for a module that reuses a source.

    Args:
        model: the module's.
        source: where its tasks come from.
        before: what ran them until now; taken again if it is of this source.

    Raises:
        FusionKitError: the source is no bundle; or as `MixedBatch`.
    """
    if before is not None and before.source is source:
        return before
    if not isinstance(source, Bundle):
        raise FusionKitError(
            f"a batch of many tasks needs a bundle, and the tasks are {source.label}, as they are; "
            "give a `codec` (Dense() keeps all), or a `bundle`"
        )
    return MixedBatch(model, source)
