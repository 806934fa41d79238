"""A recipe's file: variables written out, and paths that are meant from its own folder.

`${NAME}` in a value is the environment variable's; `$${NAME}` is the text itself.

A relative path is one from the working directory, as in a shell. One with a `/` in it that leads
nowhere from there, and to something from the recipe's own folder, is taken from that; one that
leads to something from both is refused. What is written (`out`, `bundle`, …) always goes by the
working directory: what another run left beside the recipe says nothing of where this one writes.
"""

import os
import re
import sys
from collections.abc import Callable
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import yaml

from fusionkit.checkpoints.paths import is_remote
from fusionkit.errors import FusionKitError, UsageError

_VARIABLE = re.compile(r"\$(\$?)\{([A-Za-z_]\w*)\}", re.ASCII)
_WRITTEN = ("out", "bundle", "default_root_dir", "dirpath", "save_dir")
_NO_PATH = ("class_path",)
_LARGEST, _MOST = 4 << 20, 100_000
"""Bytes of a recipe, and its values."""
_PIECE = (".yaml", ".yml")
"""How a file ends that holds a piece of a recipe: the parser finds it from the recipe's folder."""


class RecipeFile:
    """A recipe's file, as the working directory is now.

    Args:
        path: where it is.
    """

    def __init__(self, path: str) -> None:
        self.path, self._here = path, Path.cwd().resolve()
        self.folder = None if is_remote(path) else Path(path).parent

    def text(self) -> str:
        """What it says; nothing of a file that is not of the local disk, or can't be read."""
        try:
            return "" if self.folder is None else Path(self.path).read_text()
        except (OSError, UnicodeDecodeError):
            return ""  # the parser says why

    def let_import(self) -> None:
        """Let the recipe name classes of modules that lie beside it."""
        if self.folder is not None:
            own = str((self._here / self.folder).resolve())
            sys.path += [own] * (own not in sys.path)

    def written_out(self, content: dict[str, Any]) -> dict[str, Any]:
        """Its content with variables and paths written out.

        Raises:
            FusionKitError: a variable is not set, or a path leads to two things.
        """
        told: dict[str, Any] = _each_text(content, self._with_variables)
        if self.folder is not None and (self._here / self.folder).resolve() != self._here:
            told = _each_text(told, self._from_its_folder)
        return told

    def _with_variables(self, key: str, text: str) -> str:
        def value(match: re.Match[str]) -> str:
            if match[1]:
                return match[0][1:]
            if match[2] not in os.environ:
                raise FusionKitError(
                    f"{self.path}: {key}: {text}: the environment variable '{match[2]}' is not "
                    f"set; set it (export {match[2]}=…), or write the value out"
                )
            return os.environ[match[2]]

        return _VARIABLE.sub(value, text)

    def _from_its_folder(self, key: str, text: str) -> str:
        name = key.rpartition(".")[2]
        apart = is_remote(text) or text.startswith(("~", "package:")) or os.path.isabs(text)
        apart |= text.endswith(_PIECE)
        if "/" not in text or apart or "\n" in text or name in (*_WRITTEN, *_NO_PATH):
            return text
        assert self.folder is not None
        beside = str(self.folder / text)
        there, here = _led_to(self._here / beside), _led_to(self._here / text)
        if not there or there == here:
            return text
        if not here:
            return beside
        raise FusionKitError(
            f"{self.path}: {key}: {text} is there twice, from the working directory and from the "
            f"recipe's folder ({beside}); write the one that is meant as an absolute path"
        )


def refuse_endless(text: str, place: str) -> None:
    """Refuse a recipe that is larger than any that is meant, its aliases written out.

    A few lines of aliases of aliases are billions of values.

    Args:
        text: YAML; of what is none the parser says more.
        place: what messages call it.

    Raises:
        UsageError: it is.
    """
    if len(text) > _LARGEST:
        raise UsageError(f"{place}: has more than {_LARGEST >> 20} MiB, which no recipe has")
    if "*" not in text or "&" not in text:
        return
    try:
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
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


def _each_text(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """A value with each text in it changed, given the key that it is at."""
    if isinstance(value, str):
        return change(key, value)
    if isinstance(value, list):
        return [_each_text(each, change, key) for each in value]
    if isinstance(value, dict):
        return {n: _each_text(each, change, f"{key}.{n}".lstrip(".")) for n, each in value.items()}
    return value


def _led_to(path: Path) -> list[Path]:
    """What a path, or a pattern, leads to."""
    found = glob(str(path)) if has_magic(str(path)) else [str(path)] * os.path.lexists(path)
    return sorted(Path(each).resolve() for each in found)
