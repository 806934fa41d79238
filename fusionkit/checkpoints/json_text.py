"""JSON: written for people, what fits on a line on one; read from anybody, within limits."""

import json
from pathlib import Path
from typing import Any

_WIDTH = 160
_DEEPEST = 64
_LARGEST = 64 << 20
"""Bytes of a file; of tokenizers, some have half of it."""


def read_json(path: Path, largest: int = _LARGEST) -> Any:
    """What a JSON file says.

    Args:
        path: the file.
        largest: bytes that it may have.

    Raises:
        OSError: it can't be read.
        ValueError: it is larger, or as of `parsed_json`.
    """
    return parsed_json(read_bytes(path, largest))


def read_bytes(path: Path, largest: int) -> bytes:
    """A file's content.

    Raises:
        OSError: it can't be read.
        ValueError: it has more bytes.
    """
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest >> 20} MiB")
    return content


def parsed_json(text: bytes | str, levels: int = _DEEPEST) -> Any:
    """What JSON says.

    Args:
        text: JSON, of bytes in UTF-8.
        levels: as of `refuse_deep`.

    Raises:
        ValueError: it is no JSON in UTF-8, is nested deeper than `refuse_deep` has it, or holds
            half a character.
    """
    text = text if isinstance(text, str) else text.decode()
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested without end") from error
    refuse_deep(content, levels)
    if "\\u" in text and not is_text(content):
        raise ValueError("a name in it holds half a character")
    return content


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


def refuse_deep(value: Any, levels: int = _DEEPEST) -> None:
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
