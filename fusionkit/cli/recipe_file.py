"""A recipe's file: variables written out, its pieces put in, and paths from its own folder.

`${NAME}` in a value is the environment variable's; `$${NAME}` is the text itself.

A relative path is one from the working directory, as in a shell. One with a `/` in it that leads
nowhere from there, and to something from the recipe's own folder, is taken from that; one that
leads to something from both is refused. What is written (`out`, `bundle`, …) always goes by the
working directory: what another run left beside the recipe says nothing of where this one writes.

A mapping's `piece` is a YAML file, or a list of such, from the folder of the file that names it:
the mapping has what they have, and its own keys go before, at any depth. What a piece says of
variables and paths is its own.
"""

import os
import re
import sys
from collections.abc import Callable
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from fusionkit.checkpoints.paths import is_remote
from fusionkit.errors import FusionKitError, UsageError, meant

_VARIABLE = re.compile(r"\$(\$?)\{([A-Za-z_]\w*)\}", re.ASCII)
_WRITTEN = ("out", "bundle", "default_root_dir", "dirpath", "save_dir")
_NO_PATH = ("class_path",)
_LARGEST, _MOST = 4 << 20, 100_000
"""Bytes of a recipe, and its values."""
_PIECE = (".yaml", ".yml")
"""How a file ends that holds a piece of a recipe: the parser finds it from the recipe's folder."""
_NO_PIECE = ("published",)
"""Keys of files that end so, and are read by something else."""
_PUT_IN = "piece"
"""The key of the pieces that a mapping has."""


class RecipeFile:
    """A recipe's file, as the working directory is now.

    Args:
        path: where it is.
        within: of a piece, the file that it is a piece of.
    """

    def __init__(self, path: str, within: "RecipeFile | None" = None) -> None:
        self.path, self._within = path, within
        self._here: Path = within._here if within else Path.cwd().resolve()
        self.folder = None if is_remote(path) else Path(path).parent

    def text(self) -> str:
        """What it says; nothing of a file that is not of the local disk, or can't be read."""
        try:
            return "" if self.folder is None else (self._here / self.path).read_text()
        except (OSError, UnicodeDecodeError):
            return ""  # the parser says why

    def let_import(self) -> None:
        """Let the recipe name classes of modules that lie beside it."""
        if self.folder is not None:
            own = str((self._here / self.folder).resolve())
            sys.path += [own] * (own not in sys.path)

    def written_out(self, content: dict[str, Any]) -> dict[str, Any]:
        """Its content with variables, paths and pieces written out.

        Raises:
            FusionKitError: a variable is not set, or a path leads to two things.
            UsageError: a piece is not there, is no mapping, or is a piece of itself.
        """
        told: dict[str, Any] = _each_text(content, self._with_variables)
        if self.folder is not None and (self._here / self.folder).resolve() != self._here:
            told = _each_text(told, self._from_its_folder)
        found: dict[str, Any] = self._composed(told, "")
        return found

    def _composed(self, value: Any, key: str) -> Any:
        """A value with the pieces of all mappings in it put in."""
        if isinstance(value, list):
            return [self._composed(each, key) for each in value]
        if not isinstance(value, dict):
            return value
        own = {n: self._composed(each, f"{key}.{n}".lstrip(".")) for n, each in value.items()}
        named = own.get(_PUT_IN)
        files = named if isinstance(named, list) else [named]
        if not files or not all(str(each).endswith(_PIECE) for each in files):
            return own
        del own[_PUT_IN]
        found: dict[str, Any] = {}
        for each in files:
            found = _laid_over(found, self._piece(str(each), key))
        return _laid_over(found, own)

    def _piece(self, name: str, key: str) -> dict[str, Any]:
        """A piece's content, written out."""
        at = f"{key}.{_PUT_IN}".lstrip(".")
        at = f"{self.path}: {at}" if self._within else at
        path = Path(name).expanduser() if self.folder is None else self.folder / name
        there = self._here / path
        if not there.is_file():
            close = meant(path.name, [each.name for each in there.parent.glob("*.y*ml")])
            raise UsageError(f"{at}: no such file: {path} (relative to {self._here}){close}")
        if there.resolve() in self._files():
            raise UsageError(f"{at}: {path} is a piece of itself; take one of the two out")
        file = RecipeFile(str(path), self)
        text = file.text()
        refuse_endless(text, file.path)
        try:
            content = get_loader("yaml")(text)
        except yaml.YAMLError as error:
            said = " ".join(str(error).split())
            raise UsageError(f"{at}: {path} is no YAML ({said})") from error
        if not isinstance(content, dict):
            raise UsageError(f"{at}: expected a mapping in {path}, got {type(content).__name__}")
        return file.written_out(content)

    def _files(self) -> list[Path]:
        """The file itself, and those that it is a piece of."""
        above = self._within._files() if self._within else []
        return [*above, (self._here / self.path).resolve()]

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
        apart |= text.endswith(_PIECE) and key not in _NO_PIECE
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


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two mappings as one: where both have a value, and not both a mapping, it is the second's."""
    found = {**below, **above}
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            found[name] = _laid_over(below[name], value)
    return found


def _led_to(path: Path) -> list[Path]:
    """What a path, or a pattern, leads to."""
    found = glob(str(path)) if has_magic(str(path)) else [str(path)] * os.path.lexists(path)
    return sorted(Path(each).resolve() for each in found)
