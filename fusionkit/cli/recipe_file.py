"""Recipes' files, and those of their pieces: variables and paths in them are written out.

`${NAME}` in a value is the environment variable's; `$${NAME}` is the text itself.

A relative path is one from the working directory, as in a shell. One with a `/` in it that leads
nowhere from there, and to something from the recipe's own folder, is taken from that; one that
leads to something from both is refused. What is written (`out`, `bundle`, …) always goes by the
working directory: what another run left beside the recipe says nothing of where this one writes.

A piece is a YAML file that stands for what it holds: a section, a class, a mapping. Its path is
from the folder of the file that names it; to the paths in it, its own folder is the recipe's.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from fusionkit.checkpoints.paths import is_remote, open_path
from fusionkit.errors import FusionKitError, UsageError, meant

_VARIABLE = re.compile(r"\$(\$?)\{([A-Za-z_]\w*)\}", re.ASCII)
_WRITTEN = ("out", "bundle", "default_root_dir", "dirpath", "save_dir")
_NO_PATH = ("class_path",)
_LARGEST, _MOST = 4 << 20, 100_000
"""Bytes of a recipe, and its values."""
_PIECE = (".yaml", ".yml")
"""How a file ends that holds a piece of a recipe."""


class RecipeFile:
    """A recipe's file.

    Args:
        path: where it is.
        here: the working directory; by default as it is now.
    """

    def __init__(self, path: str, here: Path | None = None) -> None:
        self.path, self.here = path, here or Path.cwd().resolve()
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
            own = str((self.here / self.folder).resolve())
            sys.path += [own] * (own not in sys.path)

    def written_out(self, content: Any) -> Any:
        """Its content with variables and paths written out.

        Raises:
            FusionKitError: a variable is not set, or a path leads to two things.
        """
        told = _each_text(content, self._with_variables)
        if self.folder is not None and (self.here / self.folder).resolve() != self.here:
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
        there, here = _led_to(self.here / beside), _led_to(self.here / text)
        if not there or there == here:
            return text
        if not here:
            return beside
        raise FusionKitError(
            f"{self.path}: {key}: {text} is there twice, from the working directory and from the "
            f"recipe's folder ({beside}); write the one that is meant as an absolute path"
        )


class RecipeFiles:
    """The files that are being read: a recipe's, and within it those of its pieces."""

    def __init__(self) -> None:
        self._open: list[RecipeFile] = []

    @property
    def current(self) -> RecipeFile | None:
        """The one that is being read; None of a command line."""
        return self._open[-1] if self._open else None

    @contextmanager
    def reading(self, path: str) -> Iterator[RecipeFile]:
        """While a file is read; the modules beside it can be imported."""
        # The parser changes the working directory while it reads.
        file = RecipeFile(path, self.current.here if self.current else None)
        file.let_import()
        self._open.append(file)
        try:
            yield file
        finally:
            self._open.pop()

    def piece(self, text: str, needed: bool) -> str | None:
        """The path of the piece that a text is; None of any other text.

        Args:
            text: what a file, or the command line, has where a piece may stand.
            needed: it can be nothing else, if it ends like one.

        Raises:
            UsageError: there is no such file, or it is being read already.
        """
        own = self.current
        if not text.endswith(_PIECE) or is_remote(text) or (own and own.folder is None):
            return None
        path = open_path(text)
        if own is not None and own.folder is not None:
            path = own.here / own.folder / path
        if not path.is_file():
            if not needed:
                return None
            close = meant(path.name, (each.name for each in path.parent.glob("*.y*ml")))
            raise UsageError(f"{text}: no such piece (relative to {path.parent.resolve()}){close}")
        if any((each.here / each.path).resolve() == path.resolve() for each in self._open):
            raise UsageError(f"{text}: is a piece of itself; write out what is meant")
        return str(path)

    @contextmanager
    def inside(self, path: str) -> Iterator[Any]:
        """A piece's content, while it is written out.

        Raises:
            FusionKitError: a variable in it is not set, or a path in it leads to two things.
            UsageError: it is no YAML; or what is raised while it is written out, with its path.
        """
        with self.reading(path) as file:
            text = file.text()
            refuse_endless(text, path)
            try:
                content = get_loader("yaml")(text)
            except yaml.YAMLError as error:
                raise UsageError(f"{path}: not YAML ({error})") from error
            told = file.written_out(content)
            try:
                yield told
            except UsageError as error:
                raise UsageError(f"{path}: {error}") from error


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
