"""YAML: recipes, published figures, lock files; read within limits."""

from typing import Any

import yaml

from fusionkit.errors import UsageError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LARGEST, _MOST = 4 << 20, 100_000
"""Bytes of a file, and its values."""


def parsed_yaml(text: str, place: str) -> Any:
    """What a YAML text says.

    Args:
        text: the text.
        place: what messages call it.

    Raises:
        UsageError: as of `refuse_endless`.
        yaml.YAMLError: it is no YAML.
        RecursionError: it is nested without end.
    """
    refuse_endless(text, place)
    return yaml.load(text, _LOADER)  # noqa: S506  # a safe one


def refuse_endless(text: str, place: str) -> None:
    """Refuse YAML that is larger than any that is meant, its aliases written out.

    A few lines of aliases of aliases are billions of values.

    Args:
        text: YAML; of what is none the parser says more.
        place: what messages call it.

    Raises:
        UsageError: it is.
    """
    if len(text) > _LARGEST:
        raise UsageError(
            f"{place}: has more than {_LARGEST >> 20} MiB, which none that is meant has"
        )
    if "*" not in text or "&" not in text:
        return
    try:
        root = yaml.compose(text, Loader=_LOADER)
        count = _values(root, {}) if root else 0
    except yaml.YAMLError:
        return
    except RecursionError:
        count = _MOST + 1
    if count > _MOST:
        raise UsageError(
            f"{place}: is more than {_MOST:,} values once its aliases (`*name`) are written out; "
            "write what is meant"
        )


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node is, each alias counted as what it stands for."""
    found = known.get(id(node))
    if found is not None:
        return found
    known[id(node)] = _MOST + 1  # of one that is within itself
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inside = [each for pair in node.value for each in pair]
    elif isinstance(node, yaml.SequenceNode):
        inside = node.value
    known[id(node)] = 1 + sum(_values(each, known) for each in inside)
    return known[id(node)]
