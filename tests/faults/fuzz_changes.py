"""Changes of JSON that stay JSON: what a manifest, or the header of a part file, becomes."""

import json
from random import Random
from typing import Any

_DEEP: Any = 0
for _ in range(300):
    _DEEP = [_DEEP]
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 63, 1 << 70, 0.5, 1e308, float("nan")),
    *("", "x", "w", "../../x", "\ud800", "F32", "BF16", "I64", "int2", "fp32", "delta", "exact"),
    *("svd", "dbms", "emr", "sketch", "merged", "id", "codec", "shift", "float16", [], {}, _DEEP),
    *([0], [8, 6], [1 << 40, 1 << 40], [-1], {"id": "dbms", "codec": {"id": "dense"}}),
)


def changed(target: str, data: bytes, random: Random) -> bytes | None:
    """An input of `fuzz_targets`, its JSON changed at one to four places; None: there is none."""
    head = 2 if target == "parts" else 1
    text, tail = data[head:], b""
    if target == "parts":
        length = int.from_bytes(text[:8], "little")
        text, tail = text[8 : 8 + length], text[8 + length :]
    try:
        content = json.loads(text)
        for _ in range(random.randint(1, 4)):
            _change(content, random)
        made = json.dumps(content).encode()
    except (ValueError, RecursionError):
        return None
    if target == "parts":
        made = len(made).to_bytes(8, "little") + made
    return data[:head] + made + tail


def _change(content: Any, random: Random) -> None:
    """Replace, remove, add or move one value."""
    found: list[Any] = []
    _containers(content, found)
    if not found:
        return
    node, other = random.choice(found), random.choice(found)
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    value = random.choice(VALUES)
    if random.random() < 0.3:
        inner = list(other.values()) if isinstance(other, dict) else other
        value = json.loads(json.dumps(random.choice(inner))) if inner else value
    if keys and random.random() < 0.85:
        key = random.choice(keys)
        if random.random() < 0.15:
            del node[key]
        elif isinstance(node[key], int) and random.random() < 0.5:
            node[key] = node[key] * random.choice((0, 1, 2, -1)) + random.randint(-9, 9)
        else:
            node[key] = value
    elif isinstance(node, dict):
        node[str(random.choice(VALUES))] = value
    else:
        node.append(value)


def _containers(node: Any, found: list[Any]) -> None:
    if isinstance(node, dict | list):
        found.append(node)
        for each in list(node.values()) if isinstance(node, dict) else node:
            _containers(each, found)
