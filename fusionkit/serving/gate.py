"""What every request passes: who asks, how much, for how long; and what is told of it afterwards.

A plain ASGI middleware: it reads the body before any route sees the request, so that who is not
let in costs nothing, and it alone looks after clients who go, or take nothing of their answers.
"""

import asyncio
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import Security
from fastapi.security import HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusionkit.serving.failures import RefusedError, failure
from fusionkit.serving.settings import Limits, Settings

BEARER = Security(HTTPBearer(auto_error=False, description="A key, or the admin token"))
"""What describes, in the API's schema, that a route needs a key; `Gate` sees to it."""
STATES = ("/health", "/ready")
_PAGE = "/page/"
"""What answers anyone, too: it says nothing of the tasks."""
_CHANGES = ("POST", "PUT", "DELETE")
_GONE = 499
"""The status of a request whose client has gone, in logs and figures; as nginx has it."""
_LEFT = 32_000_000
"""Bytes of a refused body that are still read, as clients look for an answer after sending all."""


@dataclass
class Record:
    """A request, as log and figures have it; the routes fill it in.

    Attributes:
        started: when it came, by `time.perf_counter`.
        deadline: until when it must be answered, by the event loop's clock.
        number: its own.
        endpoint: the route.
        task: the task, if it is served.
        status: of the response.
        prompt_tokens: that were read.
        completion_tokens: that were generated.
        closing: what is done when it has ended, however it has.
    """

    started: float
    deadline: float
    number: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    endpoint: str = "other"
    task: str | None = None
    status: int = _GONE
    prompt_tokens: int = 0
    completion_tokens: int = 0
    closing: list[Callable[[], None]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """How long it took so far."""
        return time.perf_counter() - self.started


def record_of(scope: Scope) -> Record:
    """The record of a request."""
    found: Record = scope["record"]
    return found


class Gate:
    """The middleware.

    Args:
        app: what is behind it.
        settings: who is let in, and how much they may ask.
        ended: told of each request when it has ended.
    """

    def __init__(self, app: ASGIApp, settings: Settings, ended: Callable[[Record], None]) -> None:
        self._app, self._settings, self._ended = app, settings, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and what is answered back."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limits = self._settings.limits
        deadline = asyncio.get_running_loop().time() + limits.seconds
        record = scope["record"] = Record(time.perf_counter(), deadline)
        answer = _Answer(send, record, limits.stalled)
        try:
            await self._answered(scope, receive, answer)
        except Exception as error:
            if not isinstance(error, RefusedError | TimeoutError | ConnectionError):
                print(f"request {record.number} failed:", file=sys.stderr)
                traceback.print_exc()
            if not answer.started:
                refused = failure(error, record.number, limits.seconds)
                await refused.response()(scope, receive, answer.send)
        finally:
            for close in record.closing:
                close()
            if "route" in scope:
                record.endpoint = scope["route"].path
            self._ended(record)

    async def _answered(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        try:
            self._let_in(scope)
        except RefusedError:
            await _read_on(scope, receive)
            raise
        if scope["method"] == "PUT":  # its body goes to the disk, as it comes
            await self._app(scope, receive, answer.send)
            return
        body = await _body(scope, receive, self._settings.limits)
        gone = asyncio.ensure_future(_gone(receive))
        work = asyncio.ensure_future(self._app(scope, _Again(body, gone), answer.send))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                if not answer.finished:  # else `gone` only says that nothing more is to come
                    record_of(scope).status = _GONE
                    work.cancel()
                await asyncio.wait((work,))
        finally:
            work.cancel()
            gone.cancel()
        if not work.cancelled():
            work.result()

    def _let_in(self, scope: Scope) -> None:
        """Refuse who has no key."""
        path, keys, admin = scope["path"], self._settings.keys, self._settings.admin
        given = next((v for name, v in scope["headers"] if name == b"authorization"), b"")
        if path.partition("/")[2].partition("/")[0] == "tasks" and scope["method"] in _CHANGES:
            if not admin:
                raise RefusedError(
                    403,
                    "tasks can't be changed over HTTP here; whoever runs the server can allow it: "
                    "FUSIONKIT_ADMIN_TOKEN=… fusionkit serve …",
                    "off",
                )
            if not admin.allow(given):
                raise _unknown("the server's admin token")
        elif keys and path not in (*STATES, "/") and not path.startswith(_PAGE):
            if keys.allow(given) or admin.allow(given):
                return
            raise _unknown("a key of this server")


def _unknown(what: str) -> RefusedError:
    return RefusedError(
        401,
        f"expected the header 'Authorization: Bearer …' with {what}",
        "invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


class _Answer:
    """What is sent back; one that a client does not take is given up."""

    def __init__(self, send: Send, record: Record, stalled: float) -> None:
        self._send, self._record, self._stalled = send, record, stalled
        self.started = self.finished = False

    async def send(self, message: Message) -> None:
        """Send a message."""
        if message["type"] == "http.response.start":
            self.started = True
            self._record.status = message["status"]
            number = (b"x-request-id", self._record.number.encode())
            message["headers"] = [*message.get("headers", ()), number]
        else:
            self.finished = not message.get("more_body", False)
        try:
            async with asyncio.timeout(self._stalled):
                await self._send(message)
        except TimeoutError as error:
            self._record.status = _GONE
            raise ConnectionError("the client takes nothing of its answer") from error


class _Again:
    """A body that was read, for those behind, and then the news that the client has gone."""

    def __init__(self, body: bytes, gone: asyncio.Future[None]) -> None:
        self._body: bytes | None = body
        self._gone = gone

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.shield(self._gone)
        return {"type": "http.disconnect"}


async def _body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """A request's body, read to its end.

    Raises:
        RefusedError: it is too long, or does not come.
        ConnectionError: the client has gone.
    """
    length = next((v for name, v in scope["headers"] if name == b"content-length"), b"0")
    too_long = RefusedError(
        413,
        f"the body has more than {limits.body:,} bytes, the most that this server takes; send less "
        "at once",
        "too_large",
    )
    if int(length) > limits.body:
        await _read_on(scope, receive)
        raise too_long
    found = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionError("the client has gone")
                found += message.get("body", b"")
                more = message.get("more_body", False)
                if len(found) > limits.body:
                    if more:
                        await _read_on(scope, receive)
                    raise too_long
                if not more:
                    return bytes(found)
    except TimeoutError as error:
        raise RefusedError(
            408, f"the body did not come within {limits.seconds:g} s; send it again", "timeout"
        ) from error


async def _read_on(scope: Scope, receive: Receive) -> None:
    """Read on what is refused, for a while, unless the client waits for a word first."""
    if any(name == b"expect" for name, _ in scope["headers"]):
        return
    left = _LEFT
    try:
        async with asyncio.timeout(5.0):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def _gone(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
