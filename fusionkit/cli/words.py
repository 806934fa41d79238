"""The words of a command line: options, and what is not one."""

import json
from collections.abc import Collection, Mapping, Sequence

_TRUTHS = ("true", "false")


def with_values(args: Sequence[str], flags: Collection[str]) -> list[str]:
    """A command line whose flags all have a value: `--overwrite` becomes `--overwrite=true`.

    Args:
        args: the command line.
        flags: names of the options that may stand alone.
    """
    found: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word.removeprefix("--") in flags and word.startswith("--"):
            told = rest.pop(0).lower() if rest and rest[0].lower() in _TRUTHS else "true"
            word = f"{word}={told}"
        found.append(word)
    return found


def divided(args: Sequence[str], alone: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """What is no option, and the options, each with the value after it as `--name=value`.

    Args:
        args: the command line, after `with_values`.
        alone: options without a value, such as `--help`.
    """
    plain: list[str] = []
    options: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return plain + rest, options
        if not word.startswith("--"):
            plain.append(word)
        elif "=" in word or word in alone or not rest:
            options.append(word)
        else:
            options.append(f"{word}={rest.pop(0)}")
    return plain, options


def gathered(args: Sequence[str], several: Collection[str]) -> list[str]:
    """A command line whose options that take several words have them as one JSON list.

    `--data a b --task c` becomes `--data=["a", "b"] --task=["c"]`. A `-` within the name of any
    option becomes `_`.

    Args:
        args: the command line.
        several: names of those options; each takes all words up to the next option.
    """
    found: list[str] = []
    lists: dict[str, list[str]] = {}
    taking: list[str] | None = None
    for place, word in enumerate(args):
        if word == "--":
            return [*found, *_lists(lists), *args[place:]]
        if not word.startswith("--"):
            (found if taking is None else taking).append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        taking = None
        if name not in several:
            found.append(f"--{name}{equals}{value}")
        elif equals:
            lists.setdefault(name, []).append(value)
        else:
            taking = lists.setdefault(name, [])
    return [*found, *_lists(lists)]


def _lists(lists: Mapping[str, list[str]]) -> list[str]:
    return [f"--{name}={json.dumps(words)}" for name, words in lists.items()]
