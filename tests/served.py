"""`fusionkit serve`: as a process of its own, or its application within this one."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI
from program import PROGRAM

from fusionkit.serving.app import Health, app_of
from fusionkit.serving.engine import Engine
from fusionkit.serving.figures import Figures
from fusionkit.serving.link import Link
from fusionkit.serving.messages import Ready
from fusionkit.serving.settings import Keys, Limits, Settings
from fusionkit.serving.worker import Desk

ADMIN = "the-admin-token"
_OF_ENGINE = ("max_batch", "max_queue", "router")


class Served:
    """A server that runs until the context ends.

    Args:
        bundle: the bundle's folder.
        options: of the command line.
        environment: more variables.

    Attributes:
        url: where it is.
        client: asks it.
    """

    def __init__(self, bundle: Path, *options: object, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx2.Client(base_url=self.url, timeout=60)
        words = [str(each) for each in (PROGRAM, "serve", bundle, "--port", self.port, *options)]
        self.process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "FUSIONKIT_ADMIN_TOKEN": ADMIN, **environment},
            start_new_session=True,
        )
        self.log: list[dict[str, Any]] = []
        self.told: list[str] = []
        threading.Thread(target=self._read_log, daemon=True).start()
        threading.Thread(target=self._read_told, daemon=True).start()

    def __enter__(self) -> "Served":
        end = time.monotonic() + 300
        while not any("serving" in line for line in self.told):
            assert self.process.poll() is None, self.told
            assert time.monotonic() < end, self.told
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.stop()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end; the exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=180)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def figure(self, name: str, **labels: str) -> float:
        """One of its figures."""
        return figure(self.client.get("/metrics").text, name, **labels)

    def until(self, name: str, value: float, **labels: str) -> None:
        """Wait until a figure has a value."""
        end = time.monotonic() + 20
        while self.figure(name, **labels) != value:
            assert time.monotonic() < end, (name, self.figure(name, **labels))
            time.sleep(0.05)

    def line(self, **facts: object) -> dict[str, Any]:
        """The line of its log that says this; waits until there is one."""
        end = time.monotonic() + 20
        while True:
            for each in [*self.log]:
                if facts.items() <= each.items():
                    return each
            assert time.monotonic() < end, self.log
            time.sleep(0.02)

    def _read_log(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(json.loads(line))

    def _read_told(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.told.append(line.rstrip())


def figure(text: str, name: str, **labels: str) -> float:
    """A figure of Prometheus' text: of those with these labels, the sum; 0 where there is none."""
    from prometheus_client.parser import text_string_to_metric_families

    found = (each for family in text_string_to_metric_families(text) for each in family.samples)
    return sum(
        each.value for each in found if each.name == name and labels.items() <= each.labels.items()
    )


def application(bundle: Path, root: Path | None = None, **limits: Any) -> FastAPI:
    """The server's application with its engine in this process: no process is started.

    Args:
        bundle: the bundle's folder.
        root: as of `--tasks-root`.
        limits: as of `Limits`, and `keys`, `max_batch`, `max_queue`, `router`.
    """
    of_engine = {name: limits.pop(name) for name in _OF_ENGINE if name in limits}
    keys = Keys(limits.pop("keys", ()))
    settings = Settings(
        bundle, None, "127.0.0.1", 8000, Limits(**limits), keys, Keys([ADMIN]), root
    )
    engine = Engine(str(bundle), device="cpu", **of_engine)
    link = Link(Ready(engine.kind, tuple(engine.tasks), os.getpid(), engine.routes))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def answer(one: tuple[int, Any]) -> None:
            loop.call_soon_threadsafe(link.append, [[one]])

        desk = Desk(engine, answer, str(bundle))
        link.open(lambda commands: [desk.take(each) for each in commands] and None)
        yield
        engine.drain(0.0)

    app = app_of(settings, link, Figures(logged=False), Health(), lifespan)
    app.state.engine = engine
    return app


def asking(app: FastAPI) -> Iterator[Any]:
    """A client of an application, for as long as the test runs."""
    from starlette.testclient import TestClient

    with TestClient(app) as client:
        yield client
