"""What the HTTP process and the model's process say to each other, as much at once as there is.

There, the engine runs in a process of its own, so that neither waits for the other's Python. Every
message between them is a list: under load one trip carries what many requests have to say.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Literal

from fusionkit.serving.requests import Predict


@dataclass(frozen=True)
class Text:
    """A `Generate` whose prompt is not tokens yet: the tokenizer is where the model is.

    Attributes:
        task: whose model answers; None: the base.
        prompt: a text, a conversation, or tokens.
        max_tokens: of the answer.
        settings: `Generate`'s others.
    """

    task: str | None
    prompt: str | list[dict[str, Any]] | tuple[int, ...]
    max_tokens: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """A row to be answered; each of its answers comes back with its number."""

    number: int
    request: Text | Predict


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this row any more."""

    number: int


What = Literal["figures", "pick", "add", "remove", "stop"]


@dataclass(frozen=True)
class Call:
    """Something of the engine itself; its result comes back as a row's answer does."""

    number: int
    what: What
    argument: Any = None


@dataclass(frozen=True)
class Ready:
    """The model is loaded: what there is to be served.

    Attributes:
        kind: whether the models generate text, or classify rows.
        tasks: their names.
        process: the model's process's number.
        router: whether it picks the task of requests that name none.
    """

    kind: Literal["generation", "classification"]
    tasks: tuple[str, ...]
    process: int
    router: bool = False


Command = Ask | Cancel | Call
READY = 0
"""The number under which `Ready` comes, which answers nothing."""


class Outbox:
    """Sends from a thread of its own, in one list all that came while it sent the last.

    Args:
        send: takes a list; may block.
    """

    def __init__(self, send: Callable[[list[Any]], None]) -> None:
        self._send = send
        self._items: SimpleQueue[Any] = SimpleQueue()
        Thread(target=self._run, name="outbox", daemon=True).start()

    def put(self, item: Any) -> None:
        """Send it soon; never blocks."""
        self._items.put(item)

    def _run(self) -> None:
        while True:
            items = [self._items.get()]
            try:
                while True:
                    items.append(self._items.get_nowait())
            except Empty:
                pass
            try:
                self._send(items)
            except (EOFError, OSError):  # the other side has ended
                return
            except Exception:  # one that can't be sent must not keep the others
                traceback.print_exc()
