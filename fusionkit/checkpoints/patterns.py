r"""Regular expressions that others wrote: none is used that could take long over a name.

Python's `re` tries one way to match after the other, and can't be stopped: over thirty letters,
`(a+)+$` takes minutes. So a pattern is looked through first, and how many ways there may be is
bounded. A repeat that what follows it ends (`\d+\.`) has one; others have as many as the name has
letters, and each multiplies those before it; a repeat of what itself varies has no bound.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

_MOST = 3e8
"""Ways over one name: about a second."""
_LONGEST = 4096
_FEW = 16
_LETTERS = ("LITERAL", "NOT_LITERAL", "IN", "ANY")
_parser: Any = import_module("re._parser")


class _Ways(NamedTuple):
    """In how many ways a pattern may match: `times` × length of the name ** `power`."""

    times: int = 1
    power: int = 0

    def __mul__(self, other: Any) -> "_Ways":
        return _Ways(self.times * other.times, self.power + other.power)


def check_pattern(pattern: str, longest: int) -> None:
    """Refuse a pattern that is none, or may take long.

    Args:
        pattern: a regular expression.
        longest: letters of the longest name that it will be held against.

    Raises:
        ValueError: it is refused; the message says why, and does not name it.
    """
    ways = _ways_of(pattern)
    if ways.times * max(longest, 1) ** ways.power > _MOST:
        raise ValueError(
            f"it can match {longest} letters in more than {_MOST:.0e} ways, and would take too "
            "long: begin it with ^, and follow a repeat by what it does not match itself "
            r"(`\d+\.`, `[^.]+\.`)"
        )


@lru_cache(maxsize=4096)
def _ways_of(pattern: str) -> _Ways:
    if len(pattern) > _LONGEST:
        raise ValueError(f"it has more than {_LONGEST} letters")
    try:
        re.compile(pattern)
        tree = list(_parser.parse(pattern))
    except (re.error, OverflowError) as error:
        raise ValueError(f"it is no regular expression ({error})") from error
    except RecursionError as error:
        raise ValueError("it is nested without end") from error
    anchored = bool(tree) and str(tree[0][1]) in ("AT_BEGINNING", "AT_BEGINNING_STRING")
    return _ways(tree, None) * _Ways(power=0 if anchored else 1)


def _ways(items: Sequence[Any], after: Any) -> _Ways:
    """Of a sequence, before `after`, the item that follows it; None where that is not known."""
    found = _Ways()
    for place, (kind, value) in enumerate(items):
        behind = items[place + 1] if place + 1 < len(items) else after
        name = str(kind)
        if name.endswith("_REPEAT"):
            found *= _of_repeat(value[0], value[1], value[2], behind)
        elif name == "BRANCH":
            each = [_ways(list(branch), behind) for branch in value[1]]
            found *= _Ways(sum(one.times for one in each), max(one.power for one in each))
        elif name == "GROUPREF_EXISTS":
            for branch in filter(None, value[1:]):
                found *= _Ways(2) * _ways(list(branch), behind)
        elif name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP"):
            inner = value if name == "ATOMIC_GROUP" else value[-1]
            found *= _ways(list(inner), behind if name == "SUBPATTERN" else None)
    return found


def _of_repeat(least: int, most: int, body: Any, after: Any) -> _Ways:
    items = list(body)
    if len(items) == 1 and str(items[0][0]) in _LETTERS:
        if least == most or _ends(items[0], after):
            return _Ways()
        return _Ways(power=1) if most > _FEW else _Ways(most - least + 1)
    if most == 1:
        return _Ways(2) * _ways(items, after)
    if _ways(items, None) != _Ways() or not body.getwidth()[0]:
        raise ValueError(
            "it repeats what itself varies, which can take for ever: repeat a set of letters "
            r"(`[\w.]*`)"
        )
    return _Ways(power=1) if most > _FEW else _Ways(max(most, 1))


def _ends(letter: Any, after: Any) -> bool:
    """Whether a repeat of a letter is followed by one that it does not match."""
    while after is not None and str(after[0]) == "SUBPATTERN":
        inner = list(after[1][-1])
        after = inner[0] if inner else None
    if after is None or str(after[0]) != "LITERAL":
        return False
    return not _one(letter).fullmatch(chr(after[1]))


def _one(letter: Any) -> "re.Pattern[str]":
    """A pattern of one letter, large or small, from what the parser makes of it."""
    compiler: Any = import_module("re._compiler")
    tree = _parser.SubPattern(_parser.State(), [letter])
    tree.state.str = ""
    found: re.Pattern[str] = compiler.compile(tree, re.IGNORECASE)
    return found
