"""The HTTP process's end of the line to the model's process."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from fusionkit.errors import StoppedError
from fusionkit.serving.messages import READY, Ask, Call, Cancel, Command, Outbox, Ready, Text, What
from fusionkit.serving.requests import Piece, Predict

_GONE = "the model's process has ended, and is started again: ask again in a while"


class Taker(Protocol):
    """Who waits for answers."""

    def take(self, number: int, answer: Any) -> None:
        """An answer has come."""


class Link:
    """Hands rows over to the model's process, and each answer to whom it is for.

    Everything is called from the event loop's thread.

    Args:
        ready: what the model's process said of itself.
    """

    def __init__(self, ready: Ready) -> None:
        self.ready: Ready | None = ready
        self.kind, self.tasks, self.router = ready.kind, ready.tasks, ready.router
        self._takers: dict[int, Taker] = {}
        self._numbers = itertools.count(READY + 1)
        self._outbox: Outbox | None = None

    @property
    def waiting(self) -> int:
        """How many rows are not answered."""
        return len(self._takers)

    def open(self, put: Callable[[list[Command]], None]) -> None:
        """Begin to send.

        Args:
            put: brings a list to the model's process; may block.
        """
        self._outbox = Outbox(put)

    def append(self, response: list[Any]) -> None:
        """Take what has come; LitServe calls this, as of the queue that a response usually has."""
        for number, answer in response[0]:
            if number == READY:
                self.ready, self.tasks = answer, answer.tasks
            elif number in self._takers:
                self._takers[number].take(number, answer)

    def ask(self, rows: Sequence[Text | Predict], deadline: float) -> "Asked":
        """Have rows answered, together.

        Args:
            rows: the rows.
            deadline: until when, by the event loop's clock.

        Raises:
            StoppedError: there is no model's process at the moment.
        """
        return Asked(self, rows, deadline)

    async def call(self, what: What, argument: Any = None) -> Any:
        """Have the engine do something, and wait for its result.

        Raises:
            StoppedError: there is no model's process at the moment.
            FusionKitError: as the engine says.
        """
        taker = _Call()
        number = self.place(taker)
        self.put(Call(number, what, argument))
        try:
            return await taker.result
        finally:
            self.forget(number)

    def place(self, taker: Taker) -> int:
        """A number of its own for what is asked next.

        Raises:
            StoppedError: there is no model's process at the moment.
        """
        if self.ready is None:
            raise StoppedError(_GONE)
        number = next(self._numbers)
        self._takers[number] = taker
        return number

    def put(self, command: Command) -> None:
        """Send a command soon."""
        assert self._outbox is not None
        self._outbox.put(command)

    def forget(self, number: int) -> None:
        """Nobody waits for answers of this number."""
        self._takers.pop(number, None)

    async def watch(self) -> None:
        """Tell all who wait when the model's process has ended; runs for ever."""
        while True:
            await asyncio.sleep(0.5)
            if self.ready is not None and not _lives(self.ready.process):
                self.ready = None
                self._tell_all(_GONE)

    def stop(self) -> None:
        """Tell all who wait that the server stops."""
        self._tell_all("the server stops, and was not done with this")

    def _tell_all(self, message: str) -> None:
        for number, taker in [*self._takers.items()]:
            taker.take(number, StoppedError(message))


class Asked:
    """Rows that were handed over together, and what is answered to them.

    Args:
        link: the line.
        rows: what is asked.
        deadline: until when they must be answered.
    """

    def __init__(self, link: Link, rows: Sequence[Text | Predict], deadline: float) -> None:
        self._link, self._deadline = link, deadline
        self._answers: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._open: dict[int, int] = {}
        for place, row in enumerate(rows):
            number = link.place(self)
            self._open[number] = place
            link.put(Ask(number, row))

    def take(self, number: int, answer: Any) -> None:
        """An answer to one of the rows has come."""
        self._answers.put_nowait((number, answer))

    async def answers(self) -> AsyncIterator[tuple[int, Any]]:
        """A row's place, and an answer to it, as they come, until all rows are answered.

        Raises:
            TimeoutError: the deadline has passed.
            FusionKitError, RuntimeError: a row can't be answered.
        """
        while self._open:
            async with asyncio.timeout_at(self._deadline):
                number, answer = await self._answers.get()
            place = self._open[number]
            if not isinstance(answer, Piece) or answer.finish is not None:
                self._link.forget(number)
                del self._open[number]
            if isinstance(answer, Exception):
                raise answer
            yield place, answer

    def close(self) -> None:
        """Take back the rows that are not answered."""
        for number in self._open:
            self._link.forget(number)
            self._link.put(Cancel(number))
        self._open = {}


class _Call:
    """Waits for one result."""

    def __init__(self) -> None:
        self.result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def take(self, number: int, answer: Any) -> None:
        """The result has come."""
        if self.result.done():
            return
        if isinstance(answer, Exception):
            self.result.set_exception(answer)
        else:
            self.result.set_result(answer)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
