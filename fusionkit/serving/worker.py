"""The model's process, as LitServe starts it: an engine, fed with what comes through its queue.

LitServe's own loops call a model once a batch, or once a step, from the loop; the engine has a
thread that does so, as rows of any task join and leave between steps. So the loop here only reads
the queue, hands rows over, and never waits for the model.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import parent_process
from typing import TYPE_CHECKING, Any

from litserve import LitAPI
from litserve.loops.base import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType

from fusionkit.errors import FusionKitError
from fusionkit.serving.messages import READY, Ask, Call, Cancel, Command, Outbox, Ready, Text
from fusionkit.serving.requests import Answer, Generate, Piece, Predict, Ticket

if TYPE_CHECKING:
    from fusionkit.serving.engine import Engine

_LATER = object()
"""A call's result comes from another thread."""
CHANNEL = "fusionkit"
"""The name under which LitServe hands over all that comes from the model's process."""


class Models(LitAPI):  # type: ignore[misc]
    """A bundle's models, as LitServe knows them.

    Args:
        engine: what `Engine` is made with.
        report: takes what the process that starts this one is told: `Ready`, or why there is no
            engine.
    """

    def __init__(self, engine: dict[str, Any], report: Any) -> None:
        super().__init__(stream=True, loop=EngineLoop())
        self._settings, self._report = engine, report
        self.bundle = str(engine["bundle"])

    def setup(self, device: str) -> None:
        """Load the model."""
        # A signal to all processes at once, as Ctrl-C sends it, must not end running requests:
        # this process ends when it is told to.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        from fusionkit.serving.engine import Engine  # the others need none of its imports

        try:
            self.engine = Engine(**self._settings)
        except BaseException as error:
            if not isinstance(error, FusionKitError):
                traceback.print_exc()
            self._report.put(str(error) or type(error).__name__)
            os._exit(1)
        self.ready = Ready(self.engine.kind, self.engine.tasks, os.getpid(), self.engine.routes)
        self._report.put(self.ready)


class EngineLoop(LitLoop):  # type: ignore[misc]
    """Reads the queue for as long as the server lives."""

    def run(
        self,
        lit_api: Models,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: Any,
        workers_setup_status: Any,
        callback_runner: Any,
    ) -> None:
        """Hand over what comes; ends the process when the server has ended."""

        def send(answers: list[tuple[int, Any]]) -> None:
            kind = LoopResponseType.STREAMING
            self.put_response(transport, 0, CHANNEL, answers, LitAPIStatus.OK, kind)

        outbox = Outbox(send)
        desk = Desk(lit_api.engine, outbox.put, lit_api.bundle)
        outbox.put((READY, lit_api.ready))
        parent = parent_process()
        while True:
            try:
                item = self.get_request(request_queue, timeout=1.0)
            except (EOFError, OSError):  # the queue's own process has ended
                os._exit(0)
            if item is not None:
                for command in item[3]:
                    desk.take(command)
            elif parent is not None and not parent.is_alive():
                os._exit(0)


@dataclass
class _Row:
    """A row that is not answered yet; its ticket comes when it is taken."""

    ticket: Ticket | None = None


class Desk:
    """Takes commands to an engine, and what it answers back; called from one thread.

    Args:
        engine: the engine.
        answer: takes a row's number and an answer to it; from any thread.
        bundle: the bundle's folder, which is nothing to tell clients.
    """

    def __init__(
        self, engine: "Engine", answer: Callable[[tuple[int, Any]], None], bundle: str
    ) -> None:
        self._engine, self._answer, self._bundle = engine, answer, bundle
        self._rows: dict[int, _Row] = {}
        self._picks = ThreadPoolExecutor(1, "fusionkit-pick")

    def take(self, command: Command) -> None:
        """Do what a command says; what is wrong with it is its answer."""
        if isinstance(command, Cancel):
            row = self._rows.pop(command.number, None)
            if row is not None and row.ticket is not None:
                self._engine.cancel(row.ticket)
            return
        try:
            if isinstance(command, Ask):
                self._ask(command)
            else:
                found = self._call(command)
                if found is not _LATER:
                    self._answer((command.number, found))
        except Exception as error:
            self._rows.pop(command.number, None)
            self._answer((command.number, self._told(error)))

    def _ask(self, ask: Ask) -> None:
        request = self._with_tokens(ask.request) if isinstance(ask.request, Text) else ask.request
        row = self._rows[ask.number] = _Row()

        def to(answer: Answer) -> None:
            if not isinstance(answer, Piece) or answer.finish is not None:
                self._rows.pop(ask.number, None)
            told = self._told(answer) if isinstance(answer, Exception) else answer
            self._answer((ask.number, told))

        row.ticket = self._engine.submit(request, to)

    def _with_tokens(self, text: Text) -> Generate | Predict:
        prompt = text.prompt
        tokens = prompt if isinstance(prompt, tuple) else self._engine.tokens(text.task, prompt)
        return Generate(text.task, tokens, text.max_tokens, **text.settings)

    def _call(self, call: Call) -> Any:
        if call.what == "figures":
            return self._engine.figures()
        if call.what == "pick":
            self._picks.submit(self._pick, call)
            return _LATER
        if call.what == "stop":
            self._engine.drain(call.argument)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            return None
        change = self._engine.add if call.what == "add" else self._engine.remove
        change(call.argument)
        return self._engine.tasks

    def _pick(self, call: Call) -> None:
        try:
            found: Any = self._engine.pick(call.argument)
        except Exception as error:
            found = self._told(error)
        self._answer((call.number, found))

    def _told(self, error: Exception) -> Exception:
        """An error as it is told; one that nobody foresaw stays in this process's log."""
        if isinstance(error, FusionKitError):
            return type(error)(str(error).replace(self._bundle, "the bundle"))
        traceback.print_exception(error, file=sys.stderr)
        return RuntimeError("see the server's log")
