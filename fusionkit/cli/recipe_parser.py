"""The parser of recipes: what they say in short is written out, and errors say what to do."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from fusionkit import registry
from fusionkit.checkpoints.paths import is_remote, open_path
from fusionkit.checkpoints.yaml_text import refuse_endless
from fusionkit.cli.recipe_file import RecipeFile
from fusionkit.cli.recipe_values import RecipeValues
from fusionkit.cli.words import with_values
from fusionkit.errors import UsageError, meant

_MENDS = {
    r"Parser key \"model\".*class_path 'lightning\S*\.LightningModule'": (
        "`model` has no class_path: give one that trains, such as Finetune, and its settings as "
        "init_args\nA recipe of fine-tuned checkpoints and a codec is for 'fusionkit calibrate', "
        "or for 'fusionkit compress'"
    ),
    r"'model' does not accept option 'calibration": (
        "`calibration` is a section of its own, beside `model`: --calibration.rows, say"
    ),
    r"^(Option 'spread' is not|unrecognized arguments: --spread\b)": (
        "`spread` is read by 'fusionkit test' and 'fusionkit compare' alone; leave it out here"
    ),
}
"""What the parser says → what to do about it."""


class RecipeParser(LightningArgumentParser):
    """Writes out what recipes say in short; names the installed codecs where one is not known."""

    _file: RecipeFile | None = None

    @cached_property
    def values(self) -> RecipeValues:
        """What its options take; not to be asked for before they are all there."""
        return RecipeValues(self)

    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        """Parse a command line.

        Raises:
            FusionKitError: as of `parse_path`.
            UsageError: an option, a key, a class or a setting is mistyped.
        """
        words = with_values(args, self.values.flags)
        for recipe in recipes_in(words):  # options may set what the classes in it have
            if recipe[:1] == "{":
                self._written_out(recipe)
            elif not is_remote(recipe) and not open_path(recipe).exists():
                near = (each.name for each in open_path(recipe).parent.glob("*.y*ml"))
                close = meant(open_path(recipe).name, near)
                raise UsageError(f"{recipe}: no such recipe (relative to {Path.cwd()}){close}")
            else:
                with self._reading(recipe) as file:
                    self._written_out(file.text())
        with _urls_as_pieces(any(map(is_remote, recipes_in(words)))):
            return super().parse_args(self.values.options(words), *others, **kwargs)

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a recipe's file; the modules beside it can be imported.

        Raises:
            FusionKitError: a variable in it is not set, or a path in it leads to two things.
            UsageError: a key, a class or a setting in it is mistyped.
        """
        with self._reading(str(path)):
            return super().parse_path(path, *args, **kwargs)

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Parse a recipe's text, as `parse_path` does."""
        with _urls_as_pieces(self._file is not None and self._file.folder is None):
            return super().parse_string(self._written_out(content), *args, **kwargs)

    def parse_object(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a recipe's content, as `parse_path` does."""
        own = self.values.content(obj) if isinstance(obj, dict) else obj
        return super().parse_object(own, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, and what to do where that is known; exit."""
        for said, mend in _MENDS.items():
            if re.search(said, message, re.DOTALL):
                super().error(mend, ex)
        if "codec" in message or "merge" in message:
            message += _installed()
        super().error(message, ex)
        raise AssertionError  # super().error never returns

    @contextmanager
    def _reading(self, path: str) -> Iterator[RecipeFile]:
        """While a recipe's file is read."""
        self._file = RecipeFile(path)
        self._file.let_import()
        try:
            yield self._file
        finally:
            self._file = None

    def _written_out(self, content: str) -> str:
        """A recipe's text with what it says in short written out."""
        refuse_endless(content, self._file.path if self._file else "the recipe")
        try:
            told = get_loader("yaml")(content)
        except yaml.YAMLError:
            return content  # the parser says what is wrong with it
        if not isinstance(told, dict):
            return content
        file = self._file
        try:
            told = self.values.content(file.written_out(told) if file else told)
        except UsageError as error:
            raise UsageError(f"{file.path}: {error}" if file else str(error)) from error
        return str(yaml.safe_dump(told, sort_keys=False, allow_unicode=True))


@contextmanager
def _urls_as_pieces(taken: bool) -> Iterator[None]:
    """A context that says whether a URL may be a recipe, or a piece of one, or is a value alone.

    The parser would read every URL to see whether it is a piece: a model of many gigabytes.
    """
    set_parsing_settings(config_read_mode_fsspec_enabled=taken)
    try:
        yield
    finally:
        set_parsing_settings(config_read_mode_fsspec_enabled=False)


def recipes_in(args: Sequence[str]) -> list[str]:
    """The recipes that a command line names, or has whole."""
    found = [args[n + 1] for n, each in enumerate(args[:-1]) if each in ("--config", "-c")]
    return [*found, *(each.partition("=")[2] for each in args if each.startswith("--config="))]


def _installed() -> str:
    """The installed codecs and merges, and those that can't be used."""
    failures = registry.load_all()
    found = {
        group: [
            registry.load(group, name).__name__
            for name in registry.names(group)
            if f"{group}:{name}" not in failures
        ]
        for group in registry.GROUPS
    }
    kinds = "; ".join(f"{group}: {', '.join(names)}" for group, names in found.items())
    return f"\ninstalled ({kinds}){registry.unusable(failures)}"
