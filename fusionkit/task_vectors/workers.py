"""Who does a pass over a family's tensors: threads of this process, and other processes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from fusionkit.task_vectors.processes import ALONE, Processes

Result = TypeVar("Result")

Progress = Callable[[int, int, int], None]
"""Called as tensors are done: pass over the family (from 1), tensors done, tensors in all."""

IN_FLIGHT = 3 << 28
"""Entries, over all tasks, that may be at work at once, unless one tensor alone has more: 1.6 GB
where all of them are stored in fp16, a fraction of that by most codecs."""


class Workers:
    """Runs a function over tensors: a share of them here, each in a thread of its own.

    A thread computes with one core, whatever the machine: sums come out the same to the bit
    however many threads and processes there are.

    Attributes:
        processes: among which the tensors are shared out.
        threads: how many work at once; None: as many as PyTorch would use.

    Args:
        processes: see above.
        progress: called after each tensor of each pass of this process.
        threads: see above.
    """

    def __init__(
        self,
        processes: Processes = ALONE,
        progress: Progress | None = None,
        threads: int | None = None,
    ) -> None:
        self.processes = processes
        self._progress = progress
        self.threads = threads
        self._passes = 0

    def one_by_one(self) -> "Workers":
        """The same, with one tensor at work at a time."""
        return Workers(self.processes, self._progress, threads=1)

    def share(self, sizes: Mapping[str, int]) -> list[str]:
        """The tensors that are this process's: neighbours, of about as many entries as others'.

        Args:
            sizes: tensor's name → its number of entries, in the base's order.
        """
        total, before, own = sum(sizes.values()), 0, []
        for name, size in sizes.items():
            middle = (2 * before + size) * self.processes.count // max(2 * total, 1)
            if min(middle, self.processes.count - 1) == self.processes.rank:
                own.append(name)
            before += size
        return own

    def run(
        self,
        function: Callable[[str], Result],
        sizes: Mapping[str, int],
        counted: bool = True,
        ahead: Callable[[str], None] | None = None,
    ) -> Iterator[tuple[str, Result]]:
        """Call a function with each name; while the results are used, the next are at work.

        Args:
            function: called in several threads.
            sizes: tensor's name → its number of entries, over all tasks, which bounds how many
                tensors are at work.
            counted: whether it is a pass of which progress is told.
            ahead: called with each name before its turn, in a thread beside, so that the disk is
                at work while tensors are.

        Yields:
            name and result, in the order of the names.
        """
        self._passes += counted
        this_pass, done = self._passes, 0
        waiting: deque[tuple[str, Future[Result]]] = deque()
        held = 0
        with (
            _pool(1) as reader,
            _pool(self.threads or torch.get_num_threads()) as pool,
            full_precision(),
        ):
            names = deque(sizes)
            while names or waiting:
                while names and (not waiting or held + sizes[names[0]] <= IN_FLIGHT):
                    name = names.popleft()
                    if ahead:
                        reader.submit(ahead, name)
                    held += sizes[name]
                    waiting.append((name, pool.submit(function, name)))
                name, future = waiting.popleft()
                yield name, future.result()
                del future  # its result is not needed any more
                held -= sizes[name]
                done += 1
                if self._progress and counted:
                    self._progress(this_pass, done, len(sizes))


def total(values: Iterable[Tensor]) -> Tensor | None:
    """The sum, from the first on; None of nothing."""
    whole: Tensor | None = None
    for value in values:
        whole = value.clone() if whole is None else whole.add_(value)
    return whole


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "fusionkit", lambda: torch.set_num_threads(1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # what threads set is the default of those to come


@contextmanager
def full_precision() -> Iterator[None]:
    """A context in which new tensors are float32, as codecs expect; Trainers change that."""
    before = torch.get_default_dtype()
    if before == torch.float32:  # the default is all threads': leave it alone where it can be
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
