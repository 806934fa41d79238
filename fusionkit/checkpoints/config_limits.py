"""How large a class a configuration may ask for: what others wrote must not build for ever."""

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import register_module_module_registration_hook

_MOST_MODULES = 1 << 15
"""Of a model; where experts are stacked, none has a fifth of it."""
_MOST = {
    re.compile(r"(?:^|_)(?:layers?|depths?|blocks)$"): 1024,
    re.compile(r"(?:^|_)(?:n|num|number)_(?!positions|ctx)|label|expert"): 1 << 20,
}
"""What is in the key of a number that classes make as many parts, or entries, of → the most."""


@contextmanager
def within_limits(config: Mapping[str, Any]) -> Iterator[None]:
    """A context in which a configuration's class is built.

    Args:
        config: the content of `config.json`.

    Raises:
        ValueError: it asks for more layers, labels, … or modules than any model has.
    """
    _refuse_counts(config)
    own, count = threading.get_ident(), 0

    def counted(*_: object) -> None:
        nonlocal count
        if threading.get_ident() == own:  # the hook is of all threads
            count += 1
        if count > _MOST_MODULES and threading.get_ident() == own:
            raise ValueError(f"it has more than {_MOST_MODULES:,} modules")

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def _refuse_counts(value: Any, key: str = "") -> None:
    if isinstance(value, Mapping):
        for name, each in value.items():
            _refuse_counts(each, str(name))
    elif isinstance(value, list):
        for each in value:
            _refuse_counts(each, key)
    elif isinstance(value, int | float):
        most = min((most for pattern, most in _MOST.items() if pattern.search(key)), default=value)
        if value > most:
            raise ValueError(f"'{key}' is {str(value)[:32]}, and may be up to {most:,}")
