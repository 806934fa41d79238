"""The words of a command line: options, and what is not one."""

from collections.abc import Collection, Sequence

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
