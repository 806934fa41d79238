"""JSON for people: what fits on a line is on one."""

import json
from typing import Any

_WIDTH = 160


def json_text(value: Any, indent: int = 0) -> str:
    """JSON of which a list or an object is spread over lines only where it is long.

    Args:
        value: of dicts, lists, strings, numbers, booleans and None.
        indent: of the line that it starts on.
    """
    short = json.dumps(value)
    if len(short) <= _WIDTH or not isinstance(value, dict | list):
        return short
    inner = " " * (indent + 1)
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {json_text(each, indent + 1)}" for key, each in value.items()]
    else:
        items = [json_text(each, indent + 1) for each in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n{inner}" + f",\n{inner}".join(items) + f"\n{' ' * indent}{end}"


def is_text(value: Any) -> bool:
    """Whether strings are text throughout: JSON can write half a character, which no file can."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_deep(value: Any, levels: int = 64) -> None:
    """Refuse what is nested deeper than anything that is meant.

    Args:
        value: as of `json_text`.
        levels: how deep lists and objects may lie in each other.

    Raises:
        ValueError: it is deeper.
    """
    inside = [value]
    for _ in range(levels):
        inside = [
            each
            for one in inside
            if isinstance(one, dict | list)
            for each in (one.values() if isinstance(one, dict) else one)
        ]
        if not inside:
            return
    raise ValueError(f"it is nested deeper than {levels} levels")
