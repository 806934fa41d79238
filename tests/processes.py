"""Several processes that work together, as the Trainer and `torchrun` start them.

They are forked off one process that has imported what takes seconds, and so start at once.
"""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

from torch import multiprocessing

SLOW_IMPORTS = ["lightning.pytorch", "peft", "fusionkit.reuse.module", "fusionkit.testing"]


def forking() -> ForkServerContext:
    """What starts processes off the one that has imported what takes long."""
    context = get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    return context


def together(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, count, *arguments)` in each of `count` processes, to its end.

    Where it fails in one of them, the others are ended, and its traceback is raised here.
    """
    forking()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(
        _work, (count, port, function, arguments), nprocs=count, start_method="forkserver"
    )


def by_itself(function: Callable[..., Any], *arguments: Any) -> tuple[int | None, Any]:
    """Call a function in a process of its own, where limits and signals hurt nobody.

    Returns:
        the process's exit code, negative for the signal that ended it; what the function returned,
        nothing where it did not.
    """
    context = forking()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        answer = here.recv()
    except EOFError:
        answer = None
    process.join()
    return process.exitcode, answer


def _answer(there: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    there.send(function(*arguments))


def _work(
    rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    as_rank(rank, count)
    os.environ["MASTER_PORT"] = str(port)
    function(rank, count, *arguments)


def as_rank(rank: int, count: int) -> None:
    """Tell this process its rank, as one that is started by others knows it."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": str(count),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
