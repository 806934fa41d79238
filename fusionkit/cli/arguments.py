"""Verbs without a recipe: their options are a function's parameters."""

import re
from collections.abc import Callable
from inspect import signature
from typing import Any, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from fusionkit.cli.words import divided, with_values
from fusionkit.errors import UsageError, meant

_ALONE = ("--help", "-h")
_OPTION = re.compile(r"^--([A-Za-z][A-Za-z-]*)")
"""An option's name, whose words may be joined by `-` as well as by `_`."""


def call(
    function: Callable[..., object],
    args: list[str],
    positional: str | None = None,
    several: str | None = None,
) -> object:
    """Call a function with what a command line says.

    Args:
        function: its name is the verb, its docstring the help.
        args: the command line after the verb.
        positional: the parameter that is given without its name, first.
        several: the parameter that takes all that follow it without a name.

    Returns:
        what the function returns.

    Raises:
        UsageError: an option is unknown, or has a value of another type; or one lacks.
    """
    args = ["--help" if each == "--help-all" else each for each in args]  # it is all there is
    hints = get_type_hints(function)
    names = [name for name in signature(function).parameters if name not in (positional, several)]
    flags = [name for name in names if hints[name] is bool]
    args = [_OPTION.sub(lambda found: "--" + found[1].replace("-", "_"), each) for each in args]
    words, options = divided(with_values(args, flags), _ALONE)
    for option in options:
        name = option.partition("=")[0].lstrip("-")
        if option not in _ALONE and name not in (*names, positional, several):
            raise UsageError(
                f"no option '{name}'{meant(name, names)}\n'fusionkit {function.__name__}' has "
                + ", ".join(f"--{each}" for each in names)
            )
    parser = _parser(function, positional, several)
    try:
        return function(**parser.parse_args([*words, *options]).as_dict())
    except ArgumentError as error:
        raise UsageError(f"{error}\n'fusionkit {function.__name__} --help' says more") from error


def _parser(
    function: Callable[..., object], positional: str | None, several: str | None
) -> ArgumentParser:
    summary, _, _ = (function.__doc__ or "").partition("\n")
    words = [positional.upper()] if positional else []
    words += [f"{several.upper()}…"] if several else []
    usage = " ".join([f"fusionkit {function.__name__}", *words, "[options]"])
    parser = ArgumentParser(
        prog=f"fusionkit {function.__name__}",
        usage=usage,
        description=summary,
        exit_on_error=False,
    )
    skip: set[Any] = {each for each in (positional, several) if each}
    if positional:
        parser.add_argument(positional, type=str, help=f"the {positional}'s folder")
    if several:
        parser.add_argument(several, type=str, nargs="+")
    parser.add_function_arguments(function, skip=skip, as_group=False)
    return parser
