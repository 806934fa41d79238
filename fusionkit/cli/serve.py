"""`fusionkit serve`."""

import os
import sys
from pathlib import Path

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.paths import written_out
from fusionkit.cli.arguments import call
from fusionkit.errors import FusionKitError, UsageError, in_line, of_extra

_KEYS, _ADMIN = "FUSIONKIT_API_KEYS", "FUSIONKIT_ADMIN_TOKEN"
_HOSTS = ("127.0.0.1", "0.0.0.0", "::")  # noqa: S104  (those that LitServe takes)


def run(args: list[str]) -> None:
    """Serve a bundle's tasks over HTTP."""
    call(serve, args, positional="bundle")


def serve(
    bundle: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    base: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    max_batch: int = 32,
    max_queue: int = 256,
    max_tokens: int = 1024,
    max_body: int = 1_000_000,
    timeout: float = 120.0,
    grace: float = 30.0,
    tasks_root: str | None = None,
    max_upload: int = 1_000_000_000,
    router: bool = False,
) -> None:
    """Serve a bundle's tasks over HTTP, requests for different tasks in one batch.

    Args:
        bundle: the bundle's folder, or its name on the Hugging Face Hub.
        host: 127.0.0.1: this machine alone; 0.0.0.0 or ::: others, too.
        port: where to listen, from 1024.
        base: the base model, if it is not where it was when the bundle was made.
        device: where to run: cpu, cuda; by default the GPU where there is one.
        dtype: fp32, fp16 or bf16; by default the base's.
        max_batch: rows that the model takes at once, at most.
        max_queue: rows that may wait; then requests are refused, 429.
        max_tokens: how long a generated answer may be.
        max_body: bytes of a request, at most, else 413.
        timeout: seconds for a request and its answer, else 408.
        grace: seconds that running requests have to end when the server is stopped.
        tasks_root: folder of which models may be added while it runs (POST /tasks).
        max_upload: bytes of a model that is sent (PUT /tasks/NAME), at most.
        router: pick the task of requests that name none (fusionkit route makes what it takes).
    """
    of_extra("litserve", "serve", "fusionkit serve")
    of_extra("prometheus_client", "serve", "fusionkit serve")
    from fusionkit.serving.server import Server
    from fusionkit.serving.settings import Keys, Limits, Settings

    if host not in _HOSTS:
        raise UsageError(f"--host: expected one of {', '.join(_HOSTS)}, got '{host}'")
    if not 1024 <= port <= 65535:
        raise UsageError(f"--port: expected a port from 1024 to 65535, got {port}")
    at_least_one = {
        "max_batch": max_batch,
        "max_queue": max_queue,
        "max_tokens": max_tokens,
        "max_body": max_body,
        "max_upload": max_upload,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise UsageError(f"--{name}: expected at least 1, got {value}")
    if timeout <= 0:
        raise UsageError(f"--timeout: expected more than 0, got {timeout}")
    keys = Keys(os.environ.get(_KEYS, "").split(","))
    admin = Keys([os.environ.get(_ADMIN, "")])
    if host != _HOSTS[0] and not keys:
        _tell_open(f"{host}:{port}")
    source = _opened(bundle, base, router)  # what is wrong with it is said at once
    limits = Limits(
        body=max_body, upload=max_upload, tokens=max_tokens, seconds=timeout, grace=grace
    )
    root = None if tasks_root is None else _folder(tasks_root)
    settings = Settings(source.path, base, host, port, limits, keys, admin, root)
    engine = {
        "bundle": str(source.path),
        "base": base,
        "device": device,
        "dtype": dtype,
        "max_batch": max_batch,
        "max_queue": max_queue,
        "router": router,
    }
    _tell(f"loading {source.path}")
    Server(settings, engine, _tell).serve()


def _tell_open(place: str) -> None:
    lets_in = f"{_KEYS}=KEY,… lets in those alone who have a key"
    _tell(f"note: anyone who reaches {place} may ask; {lets_in}")


def _opened(bundle: str, base: str | None, router: bool) -> Bundle:
    """The bundle; its router is there, if it is asked for."""
    source = Bundle.from_pretrained(bundle, base)
    if router:
        from fusionkit.reuse.routing import Router

        known = Router.load(source).tasks
        if unknown := [task for task in source.tasks if task not in known]:
            names = in_line(unknown)
            _tell(f"note: the router never picks {names}; 'fusionkit route' makes it anew")
    return source


def _folder(path: str) -> Path:
    found = Path(written_out(path))
    if not found.is_dir():
        raise FusionKitError(f"--tasks-root {path}: no such folder (relative to {Path.cwd()})")
    return found.resolve()


def _tell(line: str) -> None:
    """Say something to who started the server; standard output has the log."""
    print(f"fusionkit serve: {line}", file=sys.stderr, flush=True)
