"""Help as people read it: options with their meaning, from docstrings, in few lines."""

import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter, getdoc, isclass, signature
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

WIDTH = 100
_COLUMN = 24


def options_help(
    source: Callable[..., Any], within: Collection[str] = (), prefix: str = "--"
) -> list[str]:
    """A function's parameters, or a class's settings, as options: a few lines each.

    Args:
        source: its docstring has `Args:`.
        within: names of those that are written `--codec.NAME`, as another option has the name.
        prefix: before the names of the others.
    """
    plain = isclass(source) and not is_dataclass(source)
    hints = get_type_hints(source.__init__ if plain else source)
    meanings = meanings_of(source)
    lines: list[str] = []
    for name, default in defaults_of(source).items():
        place = "--codec." if name in within else prefix
        lines += parameter(f"{place}{name}", hints[name], meanings.get(name, ""), default)
    return lines


def parameter(name: str, hint: Any, meaning: str | None, default: Any) -> list[str]:
    """One option's lines, of its type, meaning and default.

    Args:
        name: as it is written.
        hint: its type.
        meaning: in words.
        default: None, or `Parameter.empty`, where there is none to speak of.
    """
    value = "" if hint is bool else f" {_short(hint)}"
    return option(f"{name}{value}", _with_default(meaning or "", default))


def option(name: str, meaning: str) -> list[str]:
    """One option's lines."""
    text = textwrap.wrap(meaning, WIDTH - _COLUMN - 2)
    if len(name) + 2 > _COLUMN:
        return [f"  {name}", *(f"  {'':<{_COLUMN}}{line}" for line in text)]
    first, *rest = text or [""]
    return [f"  {name:<{_COLUMN}}{first}", *(f"  {'':<{_COLUMN}}{line}" for line in rest)]


def models_help() -> list[str]:
    """The lines of the models that a line names."""
    return [
        *option("BASE", "the base model: a folder, a file, a URL, or ORG/NAME on the Hub"),
        *option(
            "FINETUNED…",
            "models fine-tuned from it, whole or as adapters, likewise; globs; NAME=PATH says "
            "what a task is called",
        ),
    ]


def meanings_of(source: Callable[..., Any]) -> dict[str, str]:
    """What a docstring's `Args:` says of each parameter; a class's, those above it, too."""
    from docstring_parser import parse

    sources = reversed(source.__mro__) if isinstance(source, type) else [source]
    found = [param for each in sources for param in parse(getdoc(each) or "").params]
    return {each.arg_name: " ".join((each.description or "").split()) for each in found}


def defaults_of(source: Callable[..., Any]) -> dict[str, Any]:
    """Each parameter, or setting, and its default; `Parameter.empty` where it has none."""
    if not hasattr(source, "__dataclass_fields__"):
        return {name: each.default for name, each in signature(source).parameters.items()}
    found: dict[str, Any] = {}
    for each in fields(source):  # type: ignore[arg-type]
        made = each.default_factory() if each.default_factory is not MISSING else each.default
        found[each.name] = Parameter.empty if made is MISSING else made
    return found


def kind_of(hint: Any) -> str:
    """A type as people say it: `one of fp32, fp16`, `int or a mapping of str to int`."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (dict, Mapping):
        key, value = map(kind_of, get_args(hint))
        return f"a mapping of {key} to {value}"
    if get_origin(hint) in (list, tuple):
        return f"a list of {kind_of(get_args(hint)[0])}"
    if get_args(hint):
        return " or ".join(kind_of(each) for each in get_args(hint) if each is not NoneType)
    return getattr(hint, "__name__", str(hint))


def _short(hint: Any) -> str:
    """What an option takes, in a word or two."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is Callable:
        return "CLASS"
    if get_args(hint) and get_origin(hint) not in (dict, list, tuple):
        kinds = [_short(each) for each in get_args(hint) if each is not NoneType]
        if "TEXT" in kinds:
            return "TEXT"
        return min(kinds, key=len) if "|" not in "".join(kinds) else kinds[0]
    group = getattr(hint, "group", None)
    if group:
        return str(group).rpartition(".")[2].removesuffix("s").upper()
    names = {int: "N", float: "NUMBER", str: "TEXT", dict: "{…}", list: "[…]", tuple: "[…]"}
    plain = get_origin(hint) or hint
    return names.get(plain, "CLASS" if isclass(plain) else "VALUE")


def _with_default(meaning: str, default: Any) -> str:
    if default in (None, Parameter.empty, False, "", ()) or default in ({}, []):
        return meaning
    return f"{meaning.rstrip('.')} (default: {default})"
