"""One thread at a time changes a live model, and none calls it meanwhile.

A model that is being switched is a mixture of two tasks. Nothing waits here: who comes second is
told, since what it would then get is another task's model than it asked for.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch import nn

from fusionkit.errors import FusionKitError

_CHANGING: WeakSet[nn.Module] = WeakSet()
_LOCK = threading.Lock()
_MEND = (
    "hold a lock of your own around a switch and what needs the task, or give each thread a model"
)


@contextmanager
def sole_switch(model: nn.Module) -> Iterator[None]:
    """A context in which a model is changed; not to be entered twice by one thread either.

    Raises:
        FusionKitError: it is being changed already.
    """
    model = _itself(model)
    with _LOCK:
        if model in _CHANGING:
            raise FusionKitError(
                f"{type(model).__name__}: another thread is switching this model now; {_MEND}"
            )
        _CHANGING.add(model)
    try:
        yield
    finally:
        with _LOCK:
            _CHANGING.discard(model)


def refuse_half_switched(model: nn.Module) -> None:
    """Refuse to call a model that is a mixture of two tasks now.

    Raises:
        FusionKitError: it is being changed.
    """
    if _CHANGING and _itself(model) in _CHANGING:
        raise FusionKitError(
            f"{type(model).__name__}: called while another thread is switching it; {_MEND}"
        )


def _itself(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` has wrapped."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model
