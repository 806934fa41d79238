"""The processes of a distributed run, and what they tell each other."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from fusionkit.errors import ProcessError

Value = TypeVar("Value")

_PATIENCE = timedelta(days=7)
"""How long a process waits for the others; one that has ended is noticed at once."""


_TOLD = "told to the other processes"


class Processes:
    """One process alone.

    Attributes:
        rank: which one this is, from 0.
        count: how many there are.
    """

    rank = 0
    count = 1

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, by rank; each calls it, and all get the same.

        Raises:
            ProcessError: another process failed, or has ended.
        """
        return [value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context that ends in an error in every process, if it does in one."""
        yield


ALONE = Processes()
"""There are no others."""


class Group(Processes):
    """The processes of PyTorch's default process group.

    What they exchange is small and goes over gloo, whatever the group's own backend is.
    """

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.count = torch.distributed.get_world_size()
        group: Any = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        self._group = group

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, by rank."""
        told = self._exchange((None, value))
        for rank, (failure, _) in enumerate(told):
            if failure is not None:
                raise ProcessError(f"process {rank} of {self.count} failed: {failure}")
        return [value for _, value in told]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context that ends in an error in every process, if it does in one."""
        try:
            yield
        except ProcessError:
            raise  # the others know
        except BaseException as error:
            if not _is_told(error):
                error.__dict__[_TOLD] = True
                # Wherever the others are, they will meet next, and find this instead of a value.
                with suppress(ProcessError):
                    self._exchange((str(error) or type(error).__name__, None))
            raise

    def _exchange(self, message: Any) -> list[Any]:
        messages: list[Any] = [None] * self.count
        try:
            torch.distributed.all_gather_object(messages, message, self._group)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ProcessError(
                f"another of the {self.count} processes has ended ({reason}); run it again"
            ) from error
        return messages


def _is_told(error: BaseException | None) -> bool:
    """Whether the others know of an error, or of what it came from."""
    while error is not None:
        if _TOLD in error.__dict__:
            return True
        error = error.__cause__
    return False
