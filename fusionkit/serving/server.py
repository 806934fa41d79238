"""`fusionkit serve`: LitServe's server, with the application that is here.

LitServe starts the processes, brings what is asked to the model's and what it answers back, starts
that anew when it has ended, and stops all in order. The application is FastAPI's, as its own is.
"""

import asyncio
import itertools
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from litserve import LitServer
from litserve.utils import ResponseBufferItem

from fusionkit.errors import FusionKitError, StoppedError
from fusionkit.serving.app import Health, app_of
from fusionkit.serving.figures import Figures, log
from fusionkit.serving.link import Link
from fusionkit.serving.messages import Command, Ready
from fusionkit.serving.settings import Settings
from fusionkit.serving.worker import CHANNEL, Models


class Server(LitServer):  # type: ignore[misc]
    """LitServe's server of one bundle.

    Args:
        settings: how it is set up.
        engine: what the engine is made with.
        tell: says a line to who started it.
    """

    def __init__(
        self, settings: Settings, engine: dict[str, Any], tell: Callable[[str], None]
    ) -> None:
        self._report = multiprocessing.get_context("spawn").SimpleQueue()
        models = Models(engine, self._report)
        super().__init__(
            models, accelerator="cpu", devices=1, timeout=False, restart_workers=True
        )  # the device is the engine's to choose
        self._settings, self._tell = settings, tell
        self._channel = models.api_path
        self.uvicorn_graceful_timeout = settings.limits.grace + 5

    def serve(self) -> None:
        """Serve until a signal says to stop; running requests are ended first.

        Raises:
            FusionKitError: the model can't be loaded, or the port is not free.
        """
        _check_port(self._settings.host, self._settings.port)
        process, asked = os.getpid(), itertools.count()

        def stop(number: int, frame: Any) -> None:
            if os.getpid() == process and next(asked) == 0:  # children inherit this
                raise KeyboardInterrupt

        earlier = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.run(
                host=self._settings.host,
                port=self._settings.port,
                num_api_servers=1,
                log_level="critical",
                generate_client_file=False,
                access_log=False,
                log_config=None,
                server_header=False,
            )
        except KeyboardInterrupt:  # before it served
            pass
        finally:
            for child in multiprocessing.active_children():
                child.kill()
            for each, handler in earlier.items():
                signal.signal(each, handler)
        self._tell("stopped")

    def verify_worker_status(self) -> None:
        """Wait until the model is loaded, and make the application.

        Raises:
            FusionKitError: it can't be loaded.
        """
        while self._report.empty():
            if not any(worker.is_alive() for worker in self.inference_workers):
                raise FusionKitError(
                    "the model's process ended before the model was loaded (exit code "
                    f"{self.inference_workers[0].exitcode}); is there memory enough?"
                )
            time.sleep(0.05)
        found = self._report.get()
        if not isinstance(found, Ready):
            raise FusionKitError(found)
        self._make_app(found)

    def _make_app(self, ready: Ready) -> None:
        settings, link, health = self._settings, Link(ready), Health()
        parent = os.getpid()
        children = [each.pid for each in multiprocessing.active_children() if each.pid]
        figures = Figures()

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            queue = self.litapi_request_queues[self._channel]

            def put(commands: list[Command]) -> None:
                queue.put((0, CHANNEL, time.monotonic(), commands))

            self.response_buffer[CHANNEL] = ResponseBufferItem(asyncio.Event(), link)
            async with self.lifespan(app):
                link.open(put)
                beside = link.watch(), _end_with(parent, children), self._announce(ready)
                tasks = [asyncio.ensure_future(each) for each in beside]
                ending = _Ending(link, health, settings.limits.grace, self._tell)
                ending.hear()
                yield
                for task in tasks:
                    task.cancel()
                with suppress(StoppedError, TimeoutError):
                    await asyncio.wait_for(link.call("stop", 1.0), 3.0)
                log("stopped")

        self.app = app_of(settings, link, figures, health, lifespan)

    async def _announce(self, ready: Ready) -> None:
        """Say that it serves, as soon as it does: uvicorn listens after all else has begun."""
        host, port = self._settings.host, self._settings.port
        own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
        while True:
            try:
                _, writer = await asyncio.open_connection(own, port)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            break
        log("started", tasks=len(ready.tasks), kind=ready.kind)
        place = f"[{host}]" if ":" in host else host
        self._tell(f"serving {len(ready.tasks)} tasks on http://{place}:{port}; Ctrl-C stops")


class _Ending:
    """What happens at a signal to stop: running requests may end, until their time is up.

    Args:
        link: the line to the model's process.
        health: says that the server stops.
        grace: seconds that they have.
        tell: says a line to who started the server.
    """

    def __init__(
        self, link: Link, health: Health, grace: float, tell: Callable[[str], None]
    ) -> None:
        self._link, self._health, self._grace, self._tell = link, health, grace, tell

    def hear(self) -> None:
        """Listen to signals, before uvicorn, which then takes no new connections."""
        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            earlier: Any = signal.getsignal(each)

            def heard(number: int, frame: Any, earlier: Any = earlier) -> None:
                loop.call_soon_threadsafe(self._begin)
                earlier(number, frame)

            signal.signal(each, heard)

    def _begin(self) -> None:
        if self._health.stopping:
            return
        self._health.stopping = True
        self._tell(
            f"stopping: no new requests are taken; {self._link.waiting} rows are being answered, "
            f"and have {self._grace:g} s"
        )
        asyncio.get_running_loop().call_later(self._grace, self._link.stop)


async def _end_with(parent: int, children: list[int]) -> None:
    """End when the process that started this one has been killed, and what else it started."""
    while os.getppid() == parent:
        await asyncio.sleep(1.0)
    for each in children:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    os._exit(1)


def _check_port(host: str, port: int) -> None:
    """Refuse a port that something listens on, before a model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise FusionKitError(
                f"port {port} of {host} can't be had ({error.strerror}); stop what listens there, "
                "or choose another, --port N"
            ) from error
