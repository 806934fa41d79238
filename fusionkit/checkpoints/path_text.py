"""What a path says before the disk is asked: `~`, environment variables, names that are too long.

Recipes and calls in Python have no shell that would expand a path for them.
"""

import hashlib
import os
import re
import unicodedata
from pathlib import Path
from typing import Literal

from fusionkit.errors import FusionKitError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}/]*)\})", re.ASCII)
_FORMS: tuple[Literal["NFC"], Literal["NFD"]] = ("NFC", "NFD")
_NAME_BYTES = 255
"""What file systems take as the name of one file."""


def expanded(path: str) -> str:
    """Write out `~`, `~user`, `$NAME` and `${NAME}`, as a shell would.

    Folders that are there under a name with a `$`, or with a `~` that stands for no user, are
    taken as they are.

    Raises:
        FusionKitError: there is no such variable or user.
    """
    text = _with_variables(path)
    if not text.startswith("~"):
        return text
    home = os.path.expanduser(text)  # of Path.expanduser the error names no path
    first = text.partition("/")[0]
    if home.startswith("~") and not os.path.lexists(first):
        raise FusionKitError(
            f"{path}: no user '{first[1:]}' has a home directory here; check the name, or write "
            f"the path out (a name that begins with '~' as {Path.cwd() / text})"
        )
    return home if not home.startswith("~") else str(Path.cwd() / home)


def refuse_long_names(path: Path) -> None:
    """Refuse a path that no file can have.

    Raises:
        FusionKitError: a name in it is longer than file systems take.
    """
    for name in path.parts:
        size = len(os.fsencode(name))
        if size > _NAME_BYTES:
            raise FusionKitError(
                f"{path}: '{name[:32]}…' is a name of {size:,} bytes, and file systems take "
                f"{_NAME_BYTES}; choose a shorter one"
            )


def in_its_form(path: Path) -> Path:
    """The path as it is on disk, where a name is there in another Unicode form alone.

    `é` is one character or two (NFC, NFD): archives made on macOS have the second, keyboards the
    first.
    """
    if str(path).isascii() or os.path.lexists(path):
        return path
    found = Path(path.anchor)
    for name in path.relative_to(path.anchor).parts:
        found /= name if os.path.lexists(found / name) else _other_form(found, name)
    return found


def forms(text: str) -> list[str]:
    """A text as it is, then in the Unicode forms in which it may be on disk."""
    return list(dict.fromkeys([text, *(unicodedata.normalize(form, text) for form in _FORMS)]))


def one_form(text: str) -> str:
    """A text in the form in which two that look the same are the same."""
    return unicodedata.normalize(_FORMS[0], text)


def beside(path: Path, ending: str) -> Path:
    """Where to write what is not whole yet: `.NAME.ENDING`, beside a path.

    A name that would be too long so is told by a digest.
    """
    name = f".{path.name}.{ending}"
    if len(os.fsencode(name)) > _NAME_BYTES:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}.{ending}"
    return path.with_name(name)


def _with_variables(path: str) -> str:
    if "$" not in path:
        return path
    parts = path.split("/")
    there = len(parts)
    while there and not os.path.lexists("/".join(parts[:there])):
        there -= 1

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise FusionKitError(
                f"{path}: the environment variable '{name}' is not set; set it (export "
                f"{name}=…), or write the path out"
            )
        return os.environ[name]

    left = _VARIABLE.sub(value, "/".join(parts[there:]))
    return "/".join([*parts[:there], left]) if left else path


def _other_form(folder: Path, name: str) -> str:
    """A name as a folder has it in another Unicode form; itself where it has none."""
    plain = one_form(name)
    try:
        there = sorted(os.listdir(folder))
    except OSError:
        return name
    return next((each for each in there if one_form(each) == plain), name)
