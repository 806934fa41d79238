"""A recipe's file: variables written out, its pieces put in, and paths from its own folder.

`${NAME}` in a value is the environment variable's; `$${NAME}` is the text itself.

A relative path is one from the working directory, as in a shell. One with a `/` in it that leads
nowhere from there, and to something from the recipe's own folder, is taken from that; one that
leads to something from both is refused. What is written (`out`, `bundle`, …) always goes by the
working directory: what another run left beside the recipe says nothing of where this one writes.

A mapping's `piece` is a YAML file, or a list of such, from the folder of the file that names it:
the mapping has what they have, and its own keys go before, at any depth. What a piece says of
variables and paths is its own; `with`, beside it, sets variables in it, and in its pieces.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from fusionkit.checkpoints.paths import is_remote
from fusionkit.checkpoints.yaml_text import refuse_endless
from fusionkit.errors import FusionKitError, UsageError, meant

_VARIABLE = re.compile(r"\$(\$?)\{([A-Za-z_]\w*)\}", re.ASCII)
_WRITTEN = ("out", "bundle", "default_root_dir", "dirpath", "save_dir")
_NO_PATH = ("class_path",)
_PIECE = (".yaml", ".yml")
"""How a file ends that holds a piece of a recipe: the parser finds it from the recipe's folder."""
_NO_PIECE = ("published",)
"""Keys of files that end so, and are read by something else."""
_PUT_IN, _WITH = "piece", "with"
"""The key of the pieces that a mapping has, and of variables in them."""


class RecipeFile:
    """A recipe's file, or a piece's.

    Args:
        path: where it is.
        within: of a piece, the files that it is a piece of.
        given: variables that go before the environment's.
        here: the working directory, if not as it is now: the parser changes it while it reads.
    """

    def __init__(
        self,
        path: str,
        within: tuple[Path, ...] = (),
        given: Mapping[str, str] | None = None,
        here: Path | None = None,
    ) -> None:
        self.path, self._here, self._within = path, here or Path.cwd().resolve(), within
        self._given, self._used = dict(given or {}), set[str]()
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
        """Its content with variables, paths and pieces written out.

        Raises:
            FusionKitError: a variable is not set, or a path leads to two things.
            UsageError: a piece is not there, is no mapping, is a piece of itself, or has no such
                variable as it is given.
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
        given, used = self._variables(own.pop(_WITH, {}), key), set[str]()
        for each in files:
            content, names = self._piece(str(each), key, {**self._given, **given})
            found, used = _laid_over(found, content), used | names
        self._used |= used
        if unused := sorted(given.keys() - used):
            raise UsageError(
                f"{self._at(key, _WITH)}: no `${{{unused[0]}}}` is in {', '.join(map(str, files))}"
                f"{meant(unused[0], used) or ';'} leave it out"
            )
        return _laid_over(found, own)

    def _at(self, key: str, name: str) -> str:
        """How messages call a key; of the recipe itself, the parser says which file it is."""
        at = f"{key}.{name}".lstrip(".")
        return f"{self.path}: {at}" if self._within else at

    def _variables(self, value: Any, key: str) -> dict[str, str]:
        """The variables that a mapping gives its pieces."""
        if isinstance(value, dict) and all(isinstance(each, str | int) for each in value.values()):
            return {name: str(each) for name, each in value.items()}
        raise UsageError(
            f"{self._at(key, _WITH)}: expected variables and their values, {{NAME: text}}, got "
            f"{value!r}"
        )

    def _piece(
        self, name: str, key: str, given: Mapping[str, str]
    ) -> tuple[dict[str, Any], set[str]]:
        """A piece's content, written out, and the variables in it."""
        at = self._at(key, _PUT_IN)
        path = Path(name).expanduser() if self.folder is None else self.folder / name
        path = self._here / path
        known = (*self._within, (self._here / self.path).resolve())
        if not path.is_file():
            close = meant(path.name, [each.name for each in path.parent.glob("*.y*ml")])
            raise UsageError(f"{at}: no such file: {path} (relative to {self._here}){close}")
        if path.resolve() in known:
            raise UsageError(f"{at}: {path} is a piece of itself; take one of the two out")
        file = RecipeFile(str(path), known, given, self._here)
        text = file.text()
        refuse_endless(text, file.path)
        try:
            content = get_loader("yaml")(text)
        except yaml.YAMLError as error:
            said = " ".join(str(error).split())
            raise UsageError(f"{at}: {path} is no YAML ({said})") from error
        if not isinstance(content, dict):
            raise UsageError(f"{at}: expected a mapping in {path}, got {type(content).__name__}")
        return file.written_out(content), file._used

    def _with_variables(self, key: str, text: str) -> str:
        def value(match: re.Match[str]) -> str:
            if match[1]:
                return match[0][1:]
            self._used.add(match[2])
            if match[2] in self._given:
                return self._given[match[2]]
            if match[2] not in os.environ:
                mend = "or write the value out"
                if self._within:
                    mend = f"or give it where the piece is named (with: {{{match[2]}: …}})"
                raise FusionKitError(
                    f"{self.path}: {key}: {text}: the environment variable '{match[2]}' is not "
                    f"set; set it (export {match[2]}=…), {mend}"
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
