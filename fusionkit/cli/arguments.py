"""Verbs without a recipe: their options are a function's parameters."""

from collections.abc import Callable

from jsonargparse import ArgumentParser


def call(function: Callable[..., object], args: list[str], positional: str | None = None) -> object:
    """Call a function with what a command line says.

    Args:
        function: its name is the verb, its docstring the help.
        args: the command line after the verb.
        positional: the parameter that is given without its name, a folder.

    Returns:
        what the function returns.
    """
    summary, _, _ = (function.__doc__ or "").partition("\n")
    parser = ArgumentParser(prog=f"fusionkit {function.__name__}", description=summary)
    if positional:
        parser.add_argument(positional, type=str, help=f"the {positional}'s folder")
    skip: set[str | int] = {positional} if positional else set()
    parser.add_function_arguments(function, skip=skip, as_group=False)
    return function(**parser.parse_args(args).as_dict())
