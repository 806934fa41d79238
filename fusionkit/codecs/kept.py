"""What is made of a few bytes again and again, kept while there is room for it."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Kept(Generic[Made]):
    """Things by key: where they are too many bytes, the least recently used go.

    Threads may ask at once. Two that ask for the same may both make it; either's is right.

    Args:
        room: bytes of all.
        size: bytes of one.
    """

    def __init__(self, room: int, size: Callable[[Made], int]) -> None:
        self._room, self._size, self._used = room, size, 0
        self._things: OrderedDict[Hashable, Made] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What was made for this key, or is now: not to be changed by who asks."""
        with self._lock:
            known = self._things.get(key)
            if known is not None:
                self._things.move_to_end(key)
                return known
        made = make()
        with self._lock:
            if key not in self._things:
                self._used += self._size(made)
                self._things[key] = made
            while self._used > self._room:
                self._used -= self._size(self._things.popitem(last=False)[1])
        return made
