"""One base model in memory, and a thread of its own that answers requests of any task with it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import inf
from pathlib import Path
from threading import Condition, Thread
from time import monotonic
from typing import Any

import torch

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.checkpoint import Checkpoint, Source
from fusionkit.errors import (
    QueueFullError,
    RequestError,
    StoppedError,
    TaskGoneError,
    UnknownTaskError,
    in_line,
    lacks,
)
from fusionkit.reuse.beside import opened
from fusionkit.reuse.mixed_batch import OPERAND_BYTES, MixedBatch
from fusionkit.reuse.prompts import Messages
from fusionkit.reuse.routing import Picked
from fusionkit.serving.classification import Classification
from fusionkit.serving.free_memory import FreeMemory
from fusionkit.serving.generation import Generation
from fusionkit.serving.inputs import inputs_of
from fusionkit.serving.model import Kind, kind_of, served_model
from fusionkit.serving.picker import Picker
from fusionkit.serving.requests import Answer, Generate, Request, Ticket, To
from fusionkit.serving.served_tasks import ServedTasks
from fusionkit.serving.work import Tally, Work

_STOPPED = "the engine stopped before it had answered; ask again where another runs"


class Engine:
    """Answers requests of a bundle's tasks, those of different tasks in one batch.

    A language model's rows join and leave between two tokens; rows to be classified are put into
    batches of what waits. A task is made ready, by a thread of its own, when it is first asked for,
    while others' rows run. What is wrong with a request, its task's files, or a row alone, is told
    to that request, and no other notices.

    Args:
        bundle: a bundle, its folder, or its name on the Hugging Face Hub.
        base: the base model, where it is not where the bundle says.
        device: where the model runs; by default on the GPU, if there is one.
        dtype: of the model's weights; by default the base's.
        max_batch: rows that run at once, at most.
        max_queue: requests that wait to run, at most.
        operand_bytes: as of `MixedBatch`.
        router: pick tasks, too, by the bundle's router.

    Attributes:
        kind: whether it generates text or classifies rows.
        routes: whether it picks tasks.

    Raises:
        BundleError: as of `fusionkit.load`.
        WrongBaseError: the base at hand is another model.
        FusionKitError: models of this class can't be served.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        *,
        base: Source | Checkpoint | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        max_batch: int = 32,
        max_queue: int = 256,
        operand_bytes: int = OPERAND_BYTES,
        router: bool = False,
    ) -> None:
        self._bundle = opened(bundle, base)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, self._base_answers = served_model(self._bundle, device, dtype)
        self.kind: Kind = kind_of(model)
        self._mixed = MixedBatch(model, self._bundle, operand_bytes)
        self._served = ServedTasks(self._bundle, self.kind == "generation")
        self._tally = Tally()
        inputs = inputs_of(model, self._bundle) if self.kind == "classification" else None
        self._work: Work[Any] = (
            Generation(model, self._mixed, max_batch, self._tally)
            if inputs is None
            else Classification(model, self._mixed, inputs, max_batch, self._tally)
        )
        self._picker = Picker(model, self._bundle, self._served, inputs) if router else None
        self.routes = router
        self._max_queue = max_queue
        self._tasks = dict.fromkeys(self._bundle.tasks)
        self._changed = Condition()
        self._waiting: list[Any] = []
        self._preparing = 0
        self._orders: list[tuple[Callable[[], None], Future[None]]] = []
        self._cancelled = self._over = False
        self._stop_at: float | None = None
        self._loader = ThreadPoolExecutor(1, "fusionkit-load")
        self._preparer = ThreadPoolExecutor(1, "fusionkit-prepare")
        self._thread = Thread(target=self._run, name="fusionkit-engine", daemon=True)
        self._thread.start()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are served."""
        return tuple(self._tasks)

    def tokens(self, task: str | None, prompt: str | Messages) -> tuple[int, ...]:
        """A prompt as a task's model reads it: a text as it is, a conversation by its template.

        Raises:
            UnknownTaskError: there is no such task.
            FusionKitError: it has no tokenizer, or no chat template, or that refuses the messages.
            RequestError: there is nothing in the prompt.
        """
        self._check(task)
        return self._served.find(task).tokens(prompt)

    def pick(self, asked: Sequence[Any]) -> Picked:
        """The task that rows are taken for; any thread may call it, while others' rows run.

        Args:
            asked: prompts, or inputs as of `Predict`; all of one task.

        Raises:
            RequestError: a row is nothing that the model takes; or there is no router, or it knows
                none of the tasks.
        """
        if self._picker is None:
            raise RequestError("there is no router here: name the task")
        return self._picker.pick(asked, self._tasks)

    def submit(self, request: Request, to: To) -> Ticket:
        """Take a request; it is answered by and by. Any thread may call it; it does not block.

        Args:
            request: what is asked.
            to: is told each answer, from one of the engine's threads: it must not block. The last
                is a piece with `finish`, a `Prediction`, or an error.

        Raises:
            UnknownTaskError: there is no such task.
            RequestError: the engine is not for such requests.
            QueueFullError: too many wait.
            StoppedError: the engine takes no more.
        """
        if isinstance(request, Generate) != (self.kind == "generation"):
            does = "generate text" if self.kind == "generation" else "classify rows"
            raise RequestError(f"the models of {self._bundle.path} {does}, and do nothing else")
        self._check(request.task)
        known = self._served.known(request.task) is not None and self._mixed.holds(request.task)
        ticket = Ticket(request, to)
        with self._changed:
            if self._stop_at is not None:
                raise StoppedError("the engine is stopping, and takes no requests any more")
            if len(self._waiting) + self._preparing >= self._max_queue:
                raise QueueFullError(
                    f"{self._max_queue} requests wait already, as many as may; ask again later"
                )
            self._preparing += 1
        if not known:
            self._loader.submit(self._prepare, ticket)
        elif isinstance(request, Generate) and isinstance(request.prompt, tuple):
            self._prepare(ticket)
        else:
            self._preparer.submit(self._prepare, ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Let go of a request: its row leaves before the next step.

        A generated answer ends with a piece that says so; a prediction that was not made is not
        told of.
        """
        with self._changed:
            self._tally.cancelled += not ticket.cancelled
            ticket.cancelled = self._cancelled = True
            self._changed.notify()

    def add(self, task: str) -> None:
        """Serve a task that the bundle has got, or has got anew.

        Raises:
            UnknownTaskError: the bundle has no such task.
            StoppedError: the engine has ended.
        """

        def do() -> None:
            self._bundle.reread()
            if task not in self._bundle.tasks:
                raise UnknownTaskError(lacks(f"{self._bundle.path}:", task, self._bundle.tasks))
            self._forget(task)
            self._tasks[task] = None

        self._order(do)

    def remove(self, task: str) -> None:
        """Serve a task no more; its rows end with an error, all others go on.

        Raises:
            UnknownTaskError: there is no such task.
            StoppedError: the engine has ended.
        """
        self._check(task)

        def do() -> None:
            self._tasks.pop(task, None)
            self._bundle.reread()
            self._forget(task)

        self._order(do)

    def drain(self, timeout: float) -> None:
        """Take no more requests, answer those that were taken, and end.

        Args:
            timeout: seconds after which what is not answered ends with an error.
        """
        with self._changed:
            self._stop_at = min(self._stop_at or inf, monotonic() + timeout)
            self._changed.notify()
        self._thread.join()
        self._loader.shutdown(wait=False)
        self._preparer.shutdown(wait=False)

    def figures(self) -> dict[str, Any]:
        """What the engine did and has, a number each; those of `_total` count from the start.

        Of `rows_per_step` and `tasks_per_step` it is a mapping: rows, or distinct tasks, of a step
        → how many steps had so many.
        """
        held = self._mixed.figures
        with self._changed:
            waiting = len(self._waiting) + self._preparing
        return {
            "waiting": waiting,
            "running": len(self._work.running),
            **self._tally.figures(),
            "cache_bytes": self._work.cache_bytes,
            "operand_bytes": held.bytes,
            "operand_tasks": held.tasks,
            "operand_hits_total": held.hits,
            "operand_misses_total": held.misses,
            "operand_evictions_total": held.evicted,
        }

    def _check(self, task: str | None) -> None:
        if task is None and not self._base_answers:
            raise UnknownTaskError(
                f"{self._bundle.path}: its base has no head of its own, and answers nothing; name "
                f"a task: {in_line(self.tasks)}"
            )
        if task is not None and task not in self._tasks:
            raise UnknownTaskError(lacks(f"{self._bundle.path}:", task, self.tasks))

    def _prepare(self, ticket: Ticket) -> None:
        """Have a request wait to run, its task and its row made ready."""
        row: Any = None
        answer: Answer | None = None
        try:
            task = self._served.find(ticket.request.task)
            self._mixed.ready(task.name)
            row = self._work.row(ticket, task)
        except Exception as error:  # whatever tokenizers, processors and codecs raise
            answer = error
        with self._changed:
            self._preparing -= 1
            if self._over:
                answer = StoppedError(_STOPPED)
            elif ticket.request.task not in (None, *self._tasks):
                answer = _gone(str(ticket.request.task))
            elif row is not None and ticket.cancelled:
                answer = self._work.cancelled(row)
            elif row is not None:
                self._waiting.append(row)
            self._changed.notify()
        if answer is not None:
            self._tell(ticket, answer)

    def _order(self, do: Callable[[], None]) -> None:
        """Have something done between two steps."""
        future: Future[None] = Future()
        with self._changed:
            if self._over:
                raise StoppedError(_STOPPED)
            self._orders.append((do, future))
            self._changed.notify()
        future.result()

    def _forget(self, task: str) -> None:
        """End a task's rows, and know nothing of it any more."""
        self._mixed.forget(task)
        self._served.forget(task)
        self._end(lambda row: row.task.name == task, lambda _: _gone(task))

    def _run(self) -> None:
        memory = FreeMemory()
        while self._wait():
            with self._changed:
                orders, self._orders = self._orders, []
                swept, self._cancelled = self._cancelled, False
            for do, future in orders:
                try:
                    future.set_result(do())
                except Exception as error:
                    future.set_exception(error)
            if swept:
                self._end(lambda row: row.ticket.cancelled, self._work.cancelled)
            with self._changed:
                rows = self._work.choose(self._waiting)
                chosen = {*rows}
                self._waiting = [row for row in self._waiting if row not in chosen]
            self._turn(rows)
            memory.give_back()
        self._end(lambda _: True, lambda _: StoppedError(_STOPPED))
        for _, future in self._orders:
            future.set_exception(StoppedError(_STOPPED))

    def _wait(self) -> bool:
        """Until there is something to do; whether there will be any more."""
        with self._changed:
            while True:
                busy = self._waiting or self._work.running
                if self._stop_at is not None:
                    left = self._stop_at - monotonic()
                    if left <= 0 or not (busy or self._preparing or self._orders):
                        self._over = True
                        return False
                if busy or self._orders or self._cancelled:
                    return True
                self._changed.wait(None if self._stop_at is None else max(left, 0))

    def _turn(self, rows: list[Any]) -> None:
        """Go on by a step."""
        try:
            for row, answer in self._work.turn(rows):
                self._tell(row.ticket, answer)
        except Exception as error:  # a fault of ours; the engine goes on
            failed = [*rows, *self._work.running]
            self._work.drop(failed)
            for row in failed:
                self._tell(row.ticket, error)

    def _end(self, which: Callable[[Any], bool], why: Callable[[Any], Answer | None]) -> None:
        """End rows that wait or run."""
        with self._changed:
            ended = [row for row in (*self._waiting, *self._work.running) if which(row)]
            gone = {*ended}
            self._waiting = [row for row in self._waiting if row not in gone]
        answers = [why(row) for row in ended]
        self._work.drop(ended)
        for row, answer in zip(ended, answers, strict=True):
            if answer is not None:
                self._tell(row.ticket, answer)

    def _tell(self, ticket: Ticket, answer: Answer) -> None:
        if isinstance(answer, Exception):
            self._tally.failures += 1
        try:
            ticket.to(answer)
        except Exception:  # nobody is there
            self.cancel(ticket)


def _gone(task: str) -> TaskGoneError:
    return TaskGoneError(f"task '{task}' was removed before it had answered; ask another")
